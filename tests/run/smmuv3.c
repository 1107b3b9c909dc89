// smmuv3: QEMU 11.1's `-device arm-smmuv3,accel=on`, call by call, with the guest's own CD and tables in a memfd.
// Says on stdout where it is and waits for a line on stdin: meanwhile the test lets the device do DMA. No header of
// iommufd or VFIO is needed. Prints "ok" and exits 0, or says what was wrong and exits 1.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define DESTROY 0x3b80
#define IOAS_ALLOC 0x3b81
#define HWPT_ALLOC 0x3b89
#define GET_HW_INFO 0x3b8a
#define HWPT_INVALIDATE 0x3b8d
#define IOAS_MAP_FILE 0x3b8f
#define VIOMMU_ALLOC 0x3b90
#define VDEVICE_ALLOC 0x3b91
#define VEVENTQ_ALLOC 0x3b93
#define BIND 0x3b76
#define ATTACH 0x3b77

#define RAM 0x40000000ul
#define SIZE (16ul << 20)
#define CD 0x40a61000ul
#define TABLES 0x40b00000ul
#define BUFFER 0x40c00000ul
#define IOVA 0xfffff000ul
#define VSID 0x100ull
#define ASID 1ull

#define CHECK(x)                                                                       \
	do {                                                                           \
		if (!(x)) {                                                            \
			printf("line %d: %s (errno %d)\n", __LINE__, #x, errno);       \
			fflush(stdout);                                                \
			exit(1);                                                       \
		}                                                                      \
	} while (0)

static int iommufd, device;
static uint32_t devid, viommu;
static char *ram;

static void *at(uint64_t gpa)
{
	return ram + (gpa - RAM);
}

// ---- ioctls ----

static uint32_t hwpt_alloc(uint32_t flags, uint32_t pt, const uint64_t *ste)
{
	struct {
		uint32_t size, flags, dev_id, pt_id, out_hwpt_id, reserved, data_type, data_len;
		uint64_t data_uptr;
		uint32_t fault_id, reserved2;
	} cmd = { sizeof(cmd), flags, devid, pt, 0, 0, ste ? 2 : 0, ste ? 16 : 0, (uintptr_t)ste, 0, 0 };
	CHECK(ioctl(iommufd, HWPT_ALLOC, &cmd) == 0);
	return cmd.out_hwpt_id;
}

static void attach(uint32_t pt)
{
	uint32_t cmd[4] = { 16, 0, pt, 0 };
	CHECK(ioctl(device, ATTACH, cmd) == 0);
}

static void destroy(uint32_t id)
{
	uint32_t cmd[2] = { sizeof(cmd), id };
	CHECK(ioctl(iommufd, DESTROY, cmd) == 0);
}

static void invalidate(uint64_t word0, uint64_t word1)
{
	uint64_t command[2] = { word0, word1 };
	struct {
		uint32_t size, hwpt_id;
		uint64_t data_uptr;
		uint32_t data_type, entry_len, entry_num, reserved;
	} cmd = { sizeof(cmd), viommu, (uintptr_t)command, 1, 16, 1, 0 };
	CHECK(ioctl(iommufd, HWPT_INVALIDATE, &cmd) == 0 && cmd.entry_num == 1);
}

static void hw_info(void)
{
	uint32_t info[10];
	struct {
		uint32_t size, flags, dev_id, data_len;
		uint64_t data_uptr;
		uint32_t data_type;
		uint8_t pasid, reserved[3];
		uint64_t capabilities;
	} cmd = { sizeof(cmd), 0, devid, sizeof(info), (uintptr_t)info, 0, 0, { 0 }, 0 };
	CHECK(ioctl(iommufd, GET_HW_INFO, &cmd) == 0 && cmd.data_type == 2);
	// { flags, reserved, idr[6], iidr, aidr }
	CHECK((info[2] & 3) == 3 && (info[2] >> 27 & 3) == 1 && (info[7] & 0x77) == 0x75 && info[9] == 2);
	cmd.flags = 1; // a Tegra241 CMDQV?
	cmd.data_type = 3;
	cmd.data_len = 8;
	CHECK(ioctl(iommufd, GET_HW_INFO, &cmd) == -1 && errno == EOPNOTSUPP);
}

// ---- the guest ----

static uint64_t next_table = TABLES;

static uint64_t table(void)
{
	next_table += 4096;
	return next_table - 4096;
}

static uint64_t *slot(uint64_t root, uint64_t iova)
{
	uint64_t *entry;
	for (int shift = 39;; shift -= 9) {
		entry = (uint64_t *)at(root) + (iova >> shift & 511);
		if (shift == 12)
			return entry;
		if (!*entry)
			*entry = table() | 3;
		root = *entry & ~0xffful;
	}
}

static void tell_and_wait(const char *where)
{
	char line[16];
	printf("%s\n", where);
	fflush(stdout);
	CHECK(fgets(line, sizeof(line), stdin));
}

static void realize(void)
{
	uint32_t bind[6] = { sizeof(bind) }, ioas[3] = { sizeof(ioas) };
	int memfd = memfd_create("mach-virt.ram", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	CHECK(memfd >= 0 && ftruncate(memfd, SIZE) == 0);
	CHECK(fcntl(memfd, F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL) == 0);
	ram = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
	CHECK(ram != MAP_FAILED);
	device = open("/dev/vfio/devices/vfio1", O_RDWR);
	iommufd = open("/dev/iommu", O_RDWR);
	CHECK(device >= 0 && iommufd >= 0);
	bind[2] = iommufd;
	CHECK(ioctl(device, BIND, bind) == 0);
	devid = bind[3];
	CHECK(ioctl(iommufd, IOAS_ALLOC, ioas) == 0);
	hw_info();
	uint32_t parent = hwpt_alloc(1, ioas[2], NULL);
	attach(parent);
	struct {
		uint32_t size, flags, ioas_id;
		int32_t fd;
		uint64_t start, length, iova;
	} map = { sizeof(map), 7, ioas[2], memfd, 0, SIZE, RAM };
	CHECK(ioctl(iommufd, IOAS_MAP_FILE, &map) == 0);
	struct {
		uint32_t size, flags, type, dev_id, hwpt_id, out_viommu_id, data_len, reserved;
		uint64_t data_uptr;
	} alloc = { sizeof(alloc), 0, 1, devid, parent, 0, 0, 0, 0 };
	CHECK(sizeof(alloc) == 40 && ioctl(iommufd, VIOMMU_ALLOC, &alloc) == 0);
	viommu = alloc.out_viommu_id;
}

static int events(void)
{
	uint32_t cmd[8] = { sizeof(cmd), 0, viommu, 1, 32768 };
	char data[40];
	CHECK(sizeof(cmd) == 32 && ioctl(iommufd, VEVENTQ_ALLOC, cmd) == 0);
	int fd = cmd[6], flags = fcntl(fd, F_GETFL);
	CHECK(flags >= 0 && fcntl(fd, F_SETFL, flags | O_NONBLOCK) == 0);
	CHECK(fcntl(fd, F_GETFL) & O_NONBLOCK);
	ssize_t got = read(fd, data, sizeof(data));
	CHECK(got == 0 || (got == -1 && errno == EAGAIN));
	return fd;
}

static void expect_event(int fd, uint32_t sequence, uint64_t iova)
{
	uint32_t event[10]; // header { flags, sequence }, then 32 bytes of record
	uint64_t record[4];
	struct pollfd waiting = { fd, POLLIN, 0 };
	CHECK(poll(&waiting, 1, 10000) == 1 && waiting.revents == POLLIN);
	CHECK(read(fd, event, sizeof(event)) == sizeof(event));
	memcpy(record, event + 2, sizeof(record));
	CHECK(event[0] == 0 && event[1] == sequence);
	CHECK(record[0] == (VSID << 32 | 0x10)); // F_TRANSLATION
	CHECK(record[1] == 2ull << 40 && record[2] == iova && record[3] == 0); // CLASS IN, a write
	waiting.revents = 0;
	CHECK(poll(&waiting, 1, 0) == 0);
}

int main(void)
{
	const uint64_t abort_ste[2] = { 1, 0 }, bypass_ste[2] = { 9, 0 }, ste[2] = { 0x40a6100b, 0xd6 };
	realize();
	uint32_t aborts = hwpt_alloc(0, viommu, abort_ste), bypass = hwpt_alloc(0, viommu, bypass_ste);
	attach(bypass);
	tell_and_wait("bypass");
	CHECK(memcmp(at(BUFFER), "guest physical", 14) == 0);

	// the guest's driver starts
	struct {
		uint32_t size, viommu_id, dev_id, out_vdevice_id;
		uint64_t virt_id;
	} vdevice = { sizeof(vdevice), viommu, devid, 0, VSID };
	CHECK(sizeof(vdevice) == 24 && ioctl(iommufd, VDEVICE_ALLOC, &vdevice) == 0);
	attach(aborts);
	invalidate(0x30, 0); // TLBI_NSNH_ALL
	int queue = events();
	uint64_t root = table();
	uint64_t cd[8] = { 16 | 1ull << 8 | 1ull << 10 | 3ull << 12 | 1ull << 30 | 1ull << 31 | 5ull << 32 | 1ull << 41 |
				   1ull << 45 | 1ull << 46 | 1ull << 47 | ASID << 48, root };
	memcpy(at(CD), cd, sizeof(cd));
	uint32_t first = hwpt_alloc(0, viommu, ste);
	attach(first);
	invalidate(VSID << 32 | 0x05, 1); // CFGI_CD

	// stage 1
	*slot(root, IOVA) = BUFFER + 0x1000 + 0xf43; // valid page, AP user, SH inner, AF, nG
	tell_and_wait("stage 1");
	CHECK(memcmp(at(BUFFER + 0x1000), "through stage 1", 15) == 0);

	// unmapped: the fault is the guest's
	*slot(root, IOVA) = 0;
	invalidate(ASID << 48 | 0x12, IOVA | 1); // TLBI_NH_VA, leaf
	for (uint32_t sequence = 0; sequence < 2; sequence++) {
		tell_and_wait("unmapped");
		expect_event(queue, sequence, IOVA);
	}
	invalidate(ASID << 48 | 0x11, 0); // TLBI_NH_ASID

	// another STE
	uint32_t second = hwpt_alloc(0, viommu, ste);
	attach(second);
	destroy(first);
	*slot(root, IOVA) = BUFFER + 0x2000 + 0xf43;
	tell_and_wait("again");
	CHECK(memcmp(at(BUFFER + 0x2000), "and again", 9) == 0);
	close(queue);
	printf("ok\n");
	return 0;
}
