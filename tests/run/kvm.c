// kvm: what a VMM does whose page table a device shares: /dev/kvm, /dev/iommu and /dev/vfio/devices/vfio0, one way per
// name. Says what it has done, a word a line, and waits for a byte where the test lets the device do DMA. Ends with
// "ok" and 0, or says what was wrong and exits 1. Built static and dynamic by the tests; no header of KVM is needed.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <unistd.h>

#define GET_API_VERSION 0xae00
#define CREATE_VM 0xae01
#define CHECK_EXTENSION 0xae03
#define GET_VCPU_MMAP_SIZE 0xae04
#define CREATE_VCPU 0xae41
#define GET_DIRTY_LOG 0x4010ae42
#define SET_USER_MEMORY_REGION 0x4020ae46
#define RUN 0xae80
#define ENABLE_CAP 0x4068aea3
#define CREATE_TDP_FD 0xc010aee4
#define GET_TDP_INFO 0x80b0aee5
#define PRIVATE 0x4b564d00
#define DESTROY 0x3b80
#define IOAS_ALLOC 0x3b81
#define HWPT_ALLOC 0x3b89
#define BIND 0x3b76
#define ATTACH 0x3b77

#define PAGE 4096
#define SIZE (16 * PAGE)
#define GPA 0x100000

#define CHECK(x)                                                                       \
	do {                                                                           \
		if (!(x)) {                                                            \
			printf("line %d: %s (errno %d)\n", __LINE__, #x, errno);       \
			fflush(stdout);                                                \
			exit(1);                                                       \
		}                                                                      \
	} while (0)
#define FAILS(x, number) CHECK((x) == -1 && errno == (number))

static int kvm, vm, vcpu, tdp, iommufd, device;
static uint32_t devid, hwpt;

// The device may do something now.
static void turn(const char *word)
{
	char byte;
	printf("%s\n", word);
	fflush(stdout);
	CHECK(read(0, &byte, 1) == 1);
}

static int slot(int where, uint32_t id, uint32_t flags, uint64_t gpa, uint64_t size, void *memory)
{
	struct {
		uint32_t slot, flags;
		uint64_t gpa, size, address;
	} region = { id, flags, gpa, size, (uintptr_t)memory };
	return ioctl(where, SET_USER_MEMORY_REGION, &region);
}

static int enable(uint32_t cap, uint64_t value)
{
	uint64_t words[13] = { cap, value };
	return ioctl(vm, ENABLE_CAP, words);
}

static int create_tdp(int where, uint32_t as_id, uint32_t mode, uint32_t pad)
{
	uint32_t cmd[4] = { as_id, mode, 77, pad };
	if (ioctl(where, CREATE_TDP_FD, cmd))
		return -1;
	return cmd[2];
}

static int hwpt_kvm(int context, uint64_t fd)
{
	struct {
		uint32_t size, flags, dev_id, pt_id, out, reserved, type, length;
		uint64_t data;
		uint32_t fault, reserved2;
	} cmd = { sizeof(cmd), 0, devid, 0, 0, 0, PRIVATE, 8, (uintptr_t)&fd, 0, 0 };
	if (ioctl(context, HWPT_ALLOC, &cmd))
		return -1;
	return cmd.out;
}

static int attach(uint32_t pt)
{
	uint32_t cmd[3] = { sizeof(cmd), 0, pt };
	return ioctl(device, ATTACH, cmd);
}

static int destroy(uint32_t id)
{
	uint32_t cmd[2] = { sizeof(cmd), id };
	return ioctl(iommufd, DESTROY, cmd);
}

// KVM_GET_TDP_INFO: what it counts at an offset.
static uint64_t info(unsigned offset)
{
	uint64_t words[22];
	CHECK(ioctl(vm, GET_TDP_INFO, words) == 0);
	return words[offset / 8];
}

static void *memory(int flags, int fd)
{
	void *made = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, flags, fd, 0);
	CHECK(made != MAP_FAILED);
	return made;
}

static void new_vm(void)
{
	kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	CHECK(kvm >= 0 && ioctl(kvm, GET_API_VERSION, 0) == 12);
	CHECK(ioctl(kvm, CHECK_EXTENSION, PRIVATE) == 1 && ioctl(kvm, CHECK_EXTENSION, 1234) == 0);
	vm = ioctl(kvm, CREATE_VM, 0);
	CHECK(vm >= 0 && fcntl(vm, F_GETFD) == FD_CLOEXEC);
	CHECK(ioctl(vm, CHECK_EXTENSION, PRIVATE) == 1);
	CHECK(enable(PRIVATE + 2, 1) == 0); // count what breaks the sharing
}

static void new_table(void)
{
	vcpu = ioctl(vm, CREATE_VCPU, 0);
	tdp = create_tdp(vm, 0, 0, 0);
	CHECK(vcpu >= 0 && tdp >= 0 && fcntl(tdp, F_GETFD) == FD_CLOEXEC);
}

static void share(void)
{
	iommufd = open("/dev/iommu", O_RDWR | O_CLOEXEC);
	device = open("/dev/vfio/devices/vfio0", O_RDWR | O_CLOEXEC);
	uint32_t bind[4] = { sizeof(bind), 0, iommufd, 0 };
	CHECK(iommufd >= 0 && device >= 0 && ioctl(device, BIND, bind) == 0);
	devid = bind[3];
	hwpt = hwpt_kvm(iommufd, tdp);
	CHECK((int)hwpt > 0 && attach(hwpt) == 0);
}

// ---- DMA ----

static void story(void)
{
	uint64_t bitmap = ~0ull;
	uint64_t log[2] = { 0, (uintptr_t)&bitmap };
	new_vm();
	char *ram = memory(MAP_PRIVATE | MAP_ANONYMOUS, -1);
	CHECK(slot(vm, 0, 1, GPA, SIZE, ram) == 0);
	new_table();
	share();
	strcpy(ram + PAGE, "of the guest");
	turn("shared");
	CHECK(memcmp(ram + 2 * PAGE - 4, "by DMA!!", 8) == 0);
	CHECK(ioctl(vm, GET_DIRTY_LOG, log) == 0 && bitmap == 6);
	CHECK(ioctl(vm, GET_DIRTY_LOG, log) == 0 && bitmap == 0);
	turn("logged");
	CHECK(ioctl(vm, GET_DIRTY_LOG, log) == 0 && bitmap == 2);
	CHECK(info(160) == 1);
	CHECK(slot(vm, 0, 0, GPA, 0, NULL) == 0 && info(144) == 0);
	turn("deleted");
	CHECK(slot(vm, 0, 0, GPA, SIZE, ram) == 0);
	turn("again");
	CHECK(info(168) == 0);
	CHECK(close(vcpu) == 0 && close(tdp) == 0 && close(kvm) == 0);
	turn("closed");
	CHECK(info(160) == 1 && close(vm) == 0);
	turn("without a VM");
	CHECK(memcmp(ram, "still", 5) == 0);
}

static void kinds(void)
{
	int memfd = memfd_create("guest", 0);
	CHECK(memfd >= 0 && ftruncate(memfd, SIZE) == 0);
	new_vm();
	char *ram[3] = { memory(MAP_PRIVATE | MAP_ANONYMOUS, -1), memory(MAP_SHARED | MAP_ANONYMOUS, -1),
			 memory(MAP_SHARED, memfd) };
	for (int i = 0; i < 3; i++) {
		sprintf(ram[i] + PAGE, "kind %d", i);
		CHECK(slot(vm, i, 0, GPA * (i + 1), SIZE, ram[i]) == 0);
	}
	CHECK(slot(vm, 3, 2, GPA * 4, SIZE, ram[2]) == 0); // to be read only
	new_table();
	share();
	turn("shared");
	for (int i = 0; i < 3; i++)
		CHECK(memcmp(ram[i] + PAGE, "DMA", 3) == 0 && ram[i][PAGE + 5] == '0' + i);
	char seen[4] = "";
	CHECK(pread(memfd, seen, 3, PAGE) == 3 && !strcmp(seen, "DMA"));
	CHECK(info(168) == 0);
}

// What a device had reached, and may no longer.
static void unmaps(void)
{
	int memfd = memfd_create("guest", 0);
	CHECK(memfd >= 0 && ftruncate(memfd, SIZE) == 0);
	new_vm();
	char *ram = memory(MAP_SHARED, memfd);
	CHECK(slot(vm, 0, 0, GPA, SIZE, ram) == 0);
	new_table();
	share();
	strcpy(ram, "kept");
	turn("shared");
	CHECK(memcmp(ram + 8, "DMA", 3) == 0);
	CHECK(mprotect(ram, SIZE, PROT_READ) == 0);
	turn("read only");
	CHECK(mprotect(ram, SIZE, PROT_NONE) == 0);
	turn("nothing allowed");
	CHECK(munmap(ram, SIZE) == 0);
	turn("unmapped");
	char seen[12] = "";
	CHECK(pread(memfd, seen, 11, 0) == 11 && !strcmp(seen, "kept") && !strcmp(seen + 8, "DMA"));
	char *anew = mmap(ram, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	CHECK(anew == ram);
	strcpy(ram, "anew");
	turn("something else");
	CHECK(memcmp(ram + 8, "new", 3) == 0);
	CHECK(pread(memfd, seen, 11, 0) == 11 && !strcmp(seen, "kept") && !strcmp(seen + 8, "DMA"));
	CHECK(mprotect(ram, SIZE, PROT_READ) == 0);
	turn("private, read only");
	CHECK(memcmp(ram + 8, "new", 3) == 0);
	CHECK(info(168) == 0);
}

// ---- errors, in the order in which they are looked for ----

static void errors(void)
{
	uint32_t cmd[4] = { 0, 0, 77, 0 };
	uint32_t *constant = mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	new_vm();
	FAILS(ioctl(vm, CREATE_TDP_FD, NULL), EFAULT);
	FAILS(create_tdp(vm, 2, 0, 0), EINVAL);
	FAILS(create_tdp(vm, 0, 1, 0), EINVAL);
	FAILS(create_tdp(vm, 0, 0, 1), EINVAL);
	FAILS(create_tdp(vm, 1, 0, 0), EINVAL); // that of system management mode
	FAILS(create_tdp(vm, 0, 0, 0), EINVAL); // no vCPU
	int other = vm;
	vm = ioctl(kvm, CREATE_VM, 0);
	CHECK(vm >= 0 && enable(PRIVATE + 1, 31) == 0 && (vcpu = ioctl(vm, CREATE_VCPU, 0)) >= 0);
	FAILS(create_tdp(vm, 0, 0, 0), EINVAL); // a vCPU of 31 bits
	CHECK(close(vcpu) == 0 && close(vm) == 0);
	vm = other;
	CHECK((vcpu = ioctl(vm, CREATE_VCPU, 0)) >= 0);
	FAILS(ioctl(vm, CREATE_VCPU, 0), EEXIST);
	FAILS(ioctl(vm, CREATE_VCPU, 4096), EINVAL);
	struct rlimit limit, none = { 3, 0 };
	CHECK(getrlimit(RLIMIT_NOFILE, &limit) == 0);
	none.rlim_max = limit.rlim_max;
	CHECK(setrlimit(RLIMIT_NOFILE, &none) == 0);
	FAILS(create_tdp(vm, 0, 0, 0), EMFILE);
	FAILS(ioctl(kvm, CREATE_VM, 1), EMFILE);
	CHECK(setrlimit(RLIMIT_NOFILE, &limit) == 0);
	CHECK(constant != MAP_FAILED);
	FAILS(ioctl(vm, CREATE_TDP_FD, constant), EFAULT); // when all else is done
	CHECK(ioctl(vm, CREATE_TDP_FD, cmd) == 0);
	tdp = cmd[2];
	FAILS(create_tdp(vm, 0, 0, 0), EEXIST);
	FAILS(create_tdp(vm, 0, 0, 1), EINVAL);

	FAILS(ioctl(kvm, GET_API_VERSION, 1), EINVAL);
	FAILS(ioctl(kvm, CREATE_VM, 1), EINVAL);
	FAILS(ioctl(kvm, GET_VCPU_MMAP_SIZE, 0), EINVAL);
	FAILS(ioctl(kvm, SET_USER_MEMORY_REGION, cmd), EINVAL);
	FAILS(ioctl(kvm, IOAS_ALLOC, cmd), EINVAL);
	FAILS(ioctl(vm, GET_API_VERSION, 0), ENOTTY);
	FAILS(ioctl(vm, IOAS_ALLOC, cmd), ENOTTY);
	FAILS(ioctl(vcpu, RUN, 0), EINVAL);
	FAILS(ioctl(vcpu, IOAS_ALLOC, cmd), EINVAL);
	FAILS(slot(vm, 0, 0, GPA + 1, SIZE, NULL), EINVAL);
	FAILS(slot(vm, 0, 0, GPA, 0, NULL), EINVAL);
	uint64_t log[2] = { 5, 0 };
	FAILS(ioctl(vm, GET_DIRTY_LOG, log), ENOENT);

	share();
	FAILS(hwpt_kvm(iommufd, tdp), EBUSY);
	FAILS(hwpt_kvm(iommufd, 800), EBADF);
	FAILS(hwpt_kvm(iommufd, -1), EBADF);
	FAILS(hwpt_kvm(iommufd, 0), EOPNOTSUPP);
	FAILS(hwpt_kvm(iommufd, vm), EOPNOTSUPP);
	FAILS(hwpt_kvm(iommufd, iommufd), EOPNOTSUPP);
}

static void files(void)
{
	char byte;
	struct stat status;
	new_vm();
	new_table();
	FAILS(ioctl(tdp, GET_TDP_INFO, &byte), ENODEV);
	FAILS(ioctl(tdp, IOAS_ALLOC, &byte), ENODEV);
	int all[] = { kvm, vm, vcpu, tdp };
	for (int i = 0; i < 4; i++) {
		struct pollfd events = { all[i], POLLIN | POLLOUT, 0 };
		FAILS(read(all[i], &byte, 1), EINVAL);
		FAILS(write(all[i], &byte, 1), EINVAL);
		FAILS(pread(all[i], &byte, 1, 0), i ? ESPIPE : EINVAL);
		CHECK(poll(&events, 1, 0) == 1 && events.revents == (POLLIN | POLLOUT));
		CHECK(mmap(NULL, PAGE, PROT_READ, MAP_SHARED, all[i], 0) == MAP_FAILED && errno == ENODEV);
		if (all[i] != tdp)
			CHECK(lseek(all[i], 5, SEEK_SET) == 0);
	}
	CHECK(fstat(kvm, &status) == 0 && S_ISCHR(status.st_mode) && status.st_rdev == makedev(10, 232));
	CHECK(fstat(vm, &status) == 0 && !S_ISCHR(status.st_mode));
	CHECK(open("/dev/../dev/./kvm", O_RDWR) >= 0);
	FAILS(open("/dev/kvm", O_RDWR | O_CREAT | O_EXCL), EEXIST);
}

// ---- lives ----

// Closes in the order that `code` says, and makes the same again.
static void closes(void)
{
	for (int code = 0; code < 120; code += 7) {
		new_vm();
		new_table();
		share();
		int fds[5] = { vm, vcpu, tdp, iommufd, device }, left = 5;
		for (int rest = code; left; rest /= left + 1) {
			int which = rest % left--;
			CHECK(close(fds[which]) == 0);
			fds[which] = fds[left];
		}
		CHECK(close(kvm) == 0);
	}
	new_vm();
	new_table();
	CHECK(close(tdp) == 0);
	tdp = create_tdp(vm, 0, 0, 0); // the table is free again
	CHECK(tdp >= 0);
	int copy = dup(tdp);
	CHECK(copy >= 0 && close(tdp) == 0);
	FAILS(create_tdp(vm, 0, 0, 0), EEXIST);
	CHECK(close(copy) == 0 && create_tdp(vm, 0, 0, 0) >= 0);
}

static void send_fd(int sock, int fd)
{
	char control[CMSG_SPACE(sizeof(int))] = { 0 }, byte = 0;
	struct iovec iov = { &byte, 1 };
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control) };
	struct cmsghdr *header = CMSG_FIRSTHDR(&msg);
	header->cmsg_level = SOL_SOCKET;
	header->cmsg_type = SCM_RIGHTS;
	header->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(header), &fd, sizeof(int));
	CHECK(sendmsg(sock, &msg, 0) == 1);
}

static int receive_fd(int sock)
{
	char control[CMSG_SPACE(sizeof(int))], byte;
	struct iovec iov = { &byte, 1 };
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control) };
	int fd;
	CHECK(recvmsg(sock, &msg, 0) == 1 && CMSG_FIRSTHDR(&msg));
	memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&msg)), sizeof(int));
	return fd;
}

static void processes(void)
{
	int socks[2], status;
	uint64_t words[22];
	char byte;
	CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, socks) == 0);
	pid_t pid = fork();
	if (!pid) { // a VMM of another process gives its table, and is killed
		new_vm();
		new_table();
		CHECK(slot(vm, 0, 0, GPA, SIZE, memory(MAP_PRIVATE | MAP_ANONYMOUS, -1)) == 0);
		send_fd(socks[1], tdp);
		pause();
	}
	tdp = receive_fd(socks[0]);
	CHECK(tdp < 900);
	share();
	CHECK(kill(pid, SIGKILL) == 0 && waitpid(pid, &status, 0) == pid);
	FAILS(hwpt_kvm(iommufd, tdp), EBUSY);
	CHECK(close(device) == 0 && destroy(hwpt) == 0 && close(tdp) == 0 && close(iommufd) == 0);

	new_vm();
	new_table();
	pid = fork();
	if (!pid) {
		FAILS(ioctl(vm, GET_TDP_INFO, words), EIO);
		FAILS(ioctl(vcpu, RUN, 0), EIO);
		CHECK(ioctl(kvm, CHECK_EXTENSION, PRIVATE) == 1);
		int own = ioctl(kvm, CREATE_VM, 0);
		CHECK(own >= 0 && ioctl(own, GET_TDP_INFO, words) == 0);
		CHECK(read(socks[1], &byte, 1) == 1); // meanwhile the parent has closed the table
		_exit(0);
	}
	CHECK(close(tdp) == 0);
	FAILS(create_tdp(vm, 0, 0, 0), EEXIST); // the child has it
	CHECK(write(socks[0], "x", 1) == 1 && waitpid(pid, &status, 0) == pid && status == 0);
	CHECK(create_tdp(vm, 0, 0, 0) >= 0);
}

// The files of a VMM outlive it, and its address space: first it becomes another program, then it is killed.
static void orphans(void)
{
	int socks[2], gone[2], status;
	char byte;
	CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, socks) == 0 && pipe2(gone, O_CLOEXEC) == 0);
	pid_t pid = fork();
	if (!pid) {
		new_vm();
		CHECK(slot(vm, 0, 0, GPA, SIZE, memory(MAP_SHARED | MAP_ANONYMOUS, -1)) == 0);
		new_table();
		share();
		turn("shared");
		send_fd(socks[1], device);
		close(0);
		close(1);
		close(2);
		execlp("sleep", "sleep", "60", (char *)NULL);
		_exit(1);
	}
	CHECK(close(gone[1]) == 0);
	device = receive_fd(socks[0]);
	CHECK(read(gone[0], &byte, 1) == 0);
	turn("another program");
	CHECK(kill(pid, SIGKILL) == 0 && waitpid(pid, &status, 0) == pid && WIFSIGNALED(status));
	iommufd = open("/dev/iommu", O_RDWR); // for the daemon to notice, at the latest
	turn("killed");
}

static void killed(void)
{
	new_vm();
	CHECK(slot(vm, 0, 0, GPA, SIZE, memory(MAP_SHARED | MAP_ANONYMOUS, -1)) == 0);
	new_table();
	share();
	turn("shared");
	pause();
}

int main(int argc, char **argv)
{
	static const struct {
		const char *name;
		void (*run)(void);
	} ways[] = { { "story", story }, { "kinds", kinds },	 { "unmaps", unmaps },	     { "errors", errors },
		     { "files", files }, { "closes", closes }, { "processes", processes },
		     { "orphans", orphans }, { "killed", killed } };
	for (unsigned i = 0; i < sizeof(ways) / sizeof(ways[0]); i++)
		if (argc > 1 && !strcmp(argv[1], ways[i].name)) {
			ways[i].run();
			printf("ok\n");
			return 0;
		}
	return 2;
}
