// vfio: what a VMM does with /dev/vfio/devices/NAME and /dev/iommu, one way per name. Prints "ok" and exits 0, or says
// what was wrong and exits 1. Built static and dynamic by the tests; no header of VFIO is needed.
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

#define HWPT_ALLOC 0x3b89
#define GET_INFO 0x3b6b
#define GET_REGION_INFO 0x3b6c
#define GET_IRQ_INFO 0x3b6d
#define RESET 0x3b6f
#define BIND 0x3b76
#define ATTACH 0x3b77
#define DETACH 0x3b78
#define HWPT_PASID 8

static int opened(const char *path)
{
	int fd = open(path, O_RDWR | O_CLOEXEC);
	CHECK(fd >= 0);
	return fd;
}

static int bind_to(int device, int iommufd, uint32_t *devid)
{
	uint32_t cmd[4] = { sizeof(cmd), 0, iommufd, 0 };
	int rc = ioctl(device, BIND, cmd);
	if (devid)
		*devid = cmd[3];
	return rc;
}

static uint32_t hwpt_alloc(int iommufd, uint32_t devid, uint32_t ioas, uint32_t flags)
{
	uint32_t cmd[12] = { sizeof(cmd), flags, devid, ioas };
	CHECK(ioctl(iommufd, HWPT_ALLOC, cmd) == 0);
	return cmd[4];
}

static int attach(int device, uint32_t *pt)
{
	uint32_t cmd[3] = { sizeof(cmd), 0, *pt };
	int rc = ioctl(device, ATTACH, cmd);
	*pt = cmd[2];
	return rc;
}

static int attach_pasid(int device, uint32_t pt, uint32_t pasid)
{
	uint32_t cmd[4] = { sizeof(cmd), 1, pt, pasid };
	return ioctl(device, ATTACH, cmd);
}

static int detach(int device)
{
	uint32_t cmd[2] = { sizeof(cmd), 0 };
	return ioctl(device, DETACH, cmd);
}

static int detach_pasid(int device, uint32_t pasid)
{
	uint32_t cmd[3] = { sizeof(cmd), 1, pasid };
	return ioctl(device, DETACH, cmd);
}

// ---- what a VMM does ----

static void vmm(void)
{
	int device = opened("/dev/vfio/devices/vfio0"), iommufd = opened("/dev/iommu");
	uint32_t info[6] = { sizeof(info) }, region[8] = { sizeof(region) }, irq[4] = { sizeof(irq) };
	uint32_t devid, auto_hwpt, id;
	FAILS(ioctl(device, GET_INFO, info), EINVAL);
	CHECK(bind_to(device, iommufd, &devid) == 0 && devid == 1);
	FAILS(bind_to(device, iommufd, NULL), EINVAL);
	CHECK(ioctl(device, GET_INFO, info) == 0);
	CHECK(info[1] == 3 && info[2] == 9 && info[3] == 5 && info[4] == 0);
	FAILS(ioctl(device, GET_REGION_INFO, region), EINVAL);
	FAILS(ioctl(device, GET_IRQ_INFO, irq), ENOTTY);
	FAILS(ioctl(device, IOAS_ALLOC, region), ENOTTY);
	FAILS(ioctl(iommufd, GET_INFO, info), ENOTTY);
	CHECK(ioctl(device, RESET) == 0);

	uint32_t ioas = ioas_alloc(iommufd);
	auto_hwpt = ioas;
	CHECK(attach(device, &auto_hwpt) == 0 && auto_hwpt == ioas + 1);
	FAILS(destroy(iommufd, ioas), EBUSY);
	uint32_t hwpt = hwpt_alloc(iommufd, devid, ioas, HWPT_PASID);
	id = hwpt;
	CHECK(attach(device, &id) == 0 && id == hwpt); // replaces
	FAILS(destroy(iommufd, auto_hwpt), ENOENT);
	id = 0xffffffff;
	FAILS(attach(device, &id), ENOENT);
	CHECK(attach_pasid(device, hwpt, 5) == 0);
	CHECK(detach(device) == 0);
	FAILS(destroy(iommufd, hwpt), EBUSY);
	CHECK(detach_pasid(device, 5) == 0 && detach_pasid(device, 5) == 0);
	CHECK(destroy(iommufd, hwpt) == 0 && destroy(iommufd, ioas) == 0);
	FAILS(destroy(iommufd, devid), EBUSY);
	CHECK(close(device) == 0);
	FAILS(destroy(iommufd, devid), ENOENT);
	CHECK(close(iommufd) == 0);
}

// ---- opening and closing ----

static void order(int context_first)
{
	for (int i = 0; i < 20; i++) {
		int device = opened("/dev/vfio/devices/vfio0"), iommufd = opened("/dev/iommu");
		uint32_t pt;
		CHECK(bind_to(device, iommufd, NULL) == 0);
		pt = ioas_alloc(iommufd);
		CHECK(attach(device, &pt) == 0);
		CHECK(close(context_first ? iommufd : device) == 0);
		if (context_first)
			CHECK(detach(device) == 0);
		else
			CHECK(destroy(iommufd, 2) == 0);
		CHECK(close(context_first ? device : iommufd) == 0);
	}
}

static void openers(void)
{
	int iommufd = opened("/dev/iommu"), other = opened("/dev/iommu");
	int first = opened("/dev/vfio/devices/vfio0"), second = opened("/dev/vfio/devices/vfio0");
	int grouped = opened("/dev/vfio/devices/vfio1"), alone = opened("/dev/vfio/devices/vfio2");
	CHECK(bind_to(first, iommufd, NULL) == 0);
	FAILS(bind_to(second, iommufd, NULL), EINVAL);
	FAILS(bind_to(grouped, other, NULL), EPERM);
	CHECK(bind_to(alone, other, NULL) == 0 && bind_to(grouped, iommufd, NULL) == 0);
	int copy = dup(first);
	CHECK(copy >= 0 && close(first) == 0);
	FAILS(bind_to(second, iommufd, NULL), EINVAL);
	CHECK(close(copy) == 0);
	CHECK(bind_to(second, iommufd, NULL) == 0); // close() has unbound it before it returned
}

static void refused(void)
{
	int device = opened("/dev/vfio/devices/vfio0"), null = opened("/dev/null");
	uint64_t words[2] = { 0 };
	FAILS(open("/dev/vfio/devices/vfio9", O_RDWR), ENOENT);
	FAILS(open("/dev/vfio/devices/vfio0/x", O_RDWR), ENOENT);
	FAILS(open("/dev/vfio/devices/vfio0", O_RDWR | O_DIRECTORY), ENOTDIR);
	CHECK(open("/dev/../dev/vfio//devices/./vfio0", O_RDWR) >= 0);
	FAILS(bind_to(device, -1, NULL), EINVAL);
	FAILS(bind_to(device, 700, NULL), EBADF);
	FAILS(bind_to(device, null, NULL), EBADFD);
	FAILS(bind_to(device, device, NULL), EBADFD);
	FAILS(read(device, words, 8), EINVAL);
	FAILS(write(device, words, 8), EINVAL);
	FAILS(pread(device, words, 8, 7ull << 40), EINVAL);
	FAILS(pwrite(device, words, 8, 7ull << 40), EINVAL);
	FAILS(lseek(device, 0, SEEK_SET), ESPIPE);
	CHECK(mmap(NULL, 4096, PROT_READ, MAP_SHARED, device, 0) == MAP_FAILED && errno == EINVAL);
	struct pollfd events = { device, POLLIN | POLLOUT, 0 };
	CHECK(poll(&events, 1, 0) == 1 && events.revents == (POLLIN | POLLOUT));
	FAILS(ioctl(device, BIND, NULL), EFAULT);
}

static void status(void)
{
	int device = opened("/dev/vfio/devices/vfio1"), copy = dup(device), iommufd = opened("/dev/iommu");
	struct stat a, b;
	struct statx c;
	CHECK(fstat(device, &a) == 0 && fstatat(copy, "", &b, AT_EMPTY_PATH) == 0);
	CHECK(S_ISCHR(a.st_mode) && a.st_rdev == makedev(511, 1) && a.st_size == 0 && a.st_nlink == 1);
	CHECK(memcmp(&a, &b, sizeof(a)) == 0);
	CHECK(statx(device, "", AT_EMPTY_PATH, STATX_BASIC_STATS, &c) == 0);
	CHECK(S_ISCHR(c.stx_mode) && c.stx_rdev_major == 511 && c.stx_rdev_minor == 1);
	CHECK(c.stx_ino == a.st_ino && c.stx_mtime.tv_sec == a.st_mtime && c.stx_ctime.tv_nsec == a.st_ctim.tv_nsec);
	CHECK(makedev(c.stx_dev_major, c.stx_dev_minor) == a.st_dev && c.stx_uid == a.st_uid && c.stx_nlink == 1);
	CHECK(fstat(iommufd, &b) == 0 && S_ISCHR(b.st_mode) && major(b.st_rdev) == 10);
	CHECK(b.st_ino != a.st_ino);
	FAILS(syscall(SYS_newfstatat, device, "", (void *)8, AT_EMPTY_PATH), EFAULT);
	FAILS(fstatat(device, "x", &b, 0), ENOTDIR);
	FAILS(fstatat(device, "", &b, 0), ENOENT);
	int high = fcntl(0, F_DUPFD, 950); // not ours
	CHECK(high >= 950 && fstat(high, &a) == 0 && fstat(0, &b) == 0 && a.st_ino == b.st_ino && a.st_rdev == b.st_rdev);
}

static void processes(void)
{
	int device = opened("/dev/vfio/devices/vfio0"), iommufd = opened("/dev/iommu");
	uint32_t pt = ioas_alloc(iommufd);
	int ready[2], status;
	char byte;
	CHECK(pipe(ready) == 0);
	pid_t pid = fork();
	if (!pid) {
		CHECK(bind_to(device, iommufd, NULL) == 0);
		CHECK(attach(device, &pt) == 0);
		CHECK(write(ready[1], "x", 1) == 1);
		pause();
	}
	CHECK(close(device) == 0);
	CHECK(read(ready[0], &byte, 1) == 1);
	device = opened("/dev/vfio/devices/vfio0");
	FAILS(bind_to(device, iommufd, NULL), EINVAL); // the child has it
	CHECK(kill(pid, SIGKILL) == 0 && waitpid(pid, &status, 0) == pid);
	CHECK(bind_to(device, iommufd, NULL) == 0);
	CHECK(destroy(iommufd, 1) == 0);
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "";
	if (!strcmp(what, "vmm"))
		vmm();
	else if (!strcmp(what, "context_first"))
		order(1);
	else if (!strcmp(what, "device_first"))
		order(0);
	else if (!strcmp(what, "openers"))
		openers();
	else if (!strcmp(what, "refused"))
		refused();
	else if (!strcmp(what, "status"))
		status();
	else if (!strcmp(what, "processes"))
		processes();
	else
		return 2;
	printf("ok\n");
	return 0;
}
