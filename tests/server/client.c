/*
 * A client of iommufdd in plain C, written from docs/PROTOCOL.md alone. Needs no header of ours; the four structures
 * and numbers it uses are those of <linux/iommufd.h>. Prints one line a check; exits 0 if all hold.
 *
 *   client SOCKET
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define MAX_PACKET 131072
#define MAX_FDS 64
#define NONE 0xffffffffu

/* <linux/iommufd.h> */
#define IOMMU_DESTROY 0x3b80
#define IOMMU_IOAS_ALLOC 0x3b81
#define IOMMU_IOAS_ALLOW_IOVAS 0x3b82
#define IOMMU_IOAS_IOVA_RANGES 0x3b84
#define IOMMU_FAULT_QUEUE_ALLOC 0x3b8e
#define IOMMU_IOAS_MAP_FILE 0x3b8f

struct ioas_alloc { uint32_t size, flags, out_ioas_id; };
struct destroy { uint32_t size, id; };
struct iova_range { uint64_t start, last; };
struct iova_ranges {
	uint32_t size, ioas_id, num_iovas, reserved;
	uint64_t allowed_iovas, out_iova_alignment;
};
struct allow_iovas { uint32_t size, ioas_id, num_iovas, reserved; uint64_t allowed_iovas; };
struct fault_alloc { uint32_t size, flags, out_fault_id, out_fault_fd; };
struct map_file {
	uint32_t size, flags, ioas_id;
	int32_t fd;
	uint64_t start, length, iova;
};

/* docs/PROTOCOL.md */
enum { IOCTL, READ, WRITE, REGISTER, UNREGISTER, SCRATCH };
enum { REASON = 1 };

struct hello {
	uint32_t magic;
	uint16_t version, kind;
	uint32_t flags, reserved;
	uint64_t mm, reserved2;
	char machine[32], device[32];
};
struct hello_reply {
	uint32_t magic;
	uint16_t version, kind;
	uint32_t error, reserved;
	uint64_t mm;
	uint32_t max_packet, max_fds;
	uint8_t reserved2[16];
};
struct request { uint32_t length; uint8_t op, flags; uint16_t segments; uint32_t cmd, arg; };
struct segment { uint64_t addr, readable, writable; uint32_t data, where; };
struct reply { uint32_t length; int32_t result; uint16_t writes, reason; uint32_t fds; };
struct record { uint32_t segment, offset, length, is_inline; };

_Static_assert(sizeof(struct hello) == 96, "hello");
_Static_assert(sizeof(struct hello_reply) == 48, "hello reply");
_Static_assert(sizeof(struct request) == 16 && sizeof(struct segment) == 32, "request");
_Static_assert(sizeof(struct reply) == 16 && sizeof(struct record) == 16, "reply");

static unsigned char out[MAX_PACKET], in[MAX_PACKET];
static size_t out_length, in_length, in_at;
static int in_fds[MAX_FDS], n_in_fds;
static int failures;

static void check(int ok, const char *what)
{
	printf("%s %s\n", ok ? "ok" : "FAILED", what);
	failures += !ok;
}

static void die(const char *what)
{
	perror(what);
	exit(2);
}

static size_t padded(size_t n)
{
	return (n + 7) & ~(size_t)7;
}

/* ---- one packet each way ---- */

static void send_packet(int sock, const void *data, size_t length, const int *fds, int n)
{
	char control[CMSG_SPACE(sizeof(int) * MAX_FDS)] = { 0 };
	struct iovec iov = { (void *)data, length };
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1 };

	if (n) {
		struct cmsghdr *cmsg = (struct cmsghdr *)control;

		msg.msg_control = control;
		msg.msg_controllen = CMSG_SPACE(sizeof(int) * n);
		cmsg->cmsg_level = SOL_SOCKET;
		cmsg->cmsg_type = SCM_RIGHTS;
		cmsg->cmsg_len = CMSG_LEN(sizeof(int) * n);
		memcpy(CMSG_DATA(cmsg), fds, sizeof(int) * n);
	}
	if (sendmsg(sock, &msg, MSG_NOSIGNAL) != (ssize_t)length)
		die("sendmsg");
}

static void receive_packet(int sock)
{
	char control[CMSG_SPACE(sizeof(int) * MAX_FDS)];
	struct iovec iov = { in, sizeof(in) };
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control,
			      .msg_controllen = sizeof(control) };
	ssize_t n = recvmsg(sock, &msg, MSG_CMSG_CLOEXEC);
	struct cmsghdr *cmsg;

	if (n <= 0 || msg.msg_flags & (MSG_TRUNC | MSG_CTRUNC))
		die("recvmsg");
	in_length = n;
	in_at = n_in_fds = 0;
	for (cmsg = CMSG_FIRSTHDR(&msg); cmsg; cmsg = CMSG_NXTHDR(&msg, cmsg)) {
		n_in_fds = (cmsg->cmsg_len - CMSG_LEN(0)) / sizeof(int);
		memcpy(in_fds, CMSG_DATA(cmsg), n_in_fds * sizeof(int));
	}
}

/* ---- requests: begin, segments, end ---- */

static struct segment pending[16];
static const void *pending_data[16];
static int n_pending;

static void inline_segment(uint64_t addr, const void *data, size_t length, size_t writable)
{
	pending[n_pending] = (struct segment){ addr, length, writable, length, 0 };
	pending_data[n_pending++] = data;
}

static void scratch_segment(uint64_t addr, uint64_t readable, uint64_t writable, uint32_t offset)
{
	pending[n_pending] = (struct segment){ addr, readable, writable, offset, 1 };
	pending_data[n_pending++] = NULL;
}

static void add_request(int op, int flags, uint32_t cmd, uint32_t arg)
{
	struct request *request = (struct request *)(out + out_length);
	unsigned char *at = (unsigned char *)(request + 1) + n_pending * sizeof(struct segment);
	int i;

	memcpy(request + 1, pending, n_pending * sizeof(struct segment));
	for (i = 0; i < n_pending; i++) {
		if (!pending_data[i])
			continue;
		memset(at, 0, padded(pending[i].data));
		memcpy(at, pending_data[i], pending[i].data);
		at += padded(pending[i].data);
	}
	*request = (struct request){ at - (unsigned char *)request, op, flags, n_pending, cmd, arg };
	out_length += request->length;
	n_pending = 0;
}

static void add_ioctl(uint32_t cmd, const void *arg, size_t length)
{
	inline_segment((uintptr_t)arg, arg, length, length);
	add_request(IOCTL, REASON, cmd, 0);
}

static void exchange(int sock, const int *fds, int n)
{
	send_packet(sock, out, out_length, fds, n);
	out_length = 0;
	receive_packet(sock);
}

/* The next reply; what it writes inline to segment 0 is stored at `arg`. */
static struct reply next_reply(void *arg, struct record *last)
{
	struct reply reply;
	size_t at = in_at + sizeof(reply);
	int i;

	memcpy(&reply, in + in_at, sizeof(reply));
	for (i = 0; i < reply.writes; i++) {
		struct record record;

		memcpy(&record, in + at, sizeof(record));
		at += sizeof(record);
		if (record.is_inline && record.segment == 0 && arg)
			memcpy((char *)arg + record.offset, in + at, record.length);
		if (record.is_inline)
			at += padded(record.length);
		if (last)
			*last = record;
	}
	if (reply.reason)
		printf("   reason: %.*s\n", reply.reason, in + at);
	in_at += reply.length;
	return reply;
}

/* ---- the checks ---- */

static int connect_to(const char *path)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	struct hello hello = { .magic = 0x44464f49, .version = 1 };
	struct hello_reply *answer = (struct hello_reply *)in;
	struct stat status;
	int sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

	strncpy(address.sun_path, path, sizeof(address.sun_path) - 1);
	if (sock < 0 || connect(sock, (struct sockaddr *)&address, sizeof(address)))
		die(path);
	send_packet(sock, &hello, sizeof(hello), NULL, 0);
	receive_packet(sock);
	check(in_length == sizeof(*answer) && answer->magic == hello.magic && !answer->error, "hello");
	check(answer->version == 1 && answer->max_packet == MAX_PACKET && answer->mm, "hello: what is told");
	check(n_in_fds == 1 && !fstat(in_fds[0], &status) && S_ISREG(status.st_mode), "hello: identity");
	close(in_fds[0]);
	return sock;
}

static int new_memfd(size_t size)
{
	int fd = memfd_create("client", MFD_CLOEXEC | MFD_ALLOW_SEALING);

	if (fd < 0 || ftruncate(fd, size) || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK))
		die("memfd");
	return fd;
}

static uint32_t batch_with_descriptors(int sock)
{
	struct ioas_alloc alloc = { .size = sizeof(alloc) };
	struct map_file map = { .size = sizeof(map), .flags = 7, .length = 4096 };
	struct destroy gone = { sizeof(gone), 4711 };
	int fds[2] = { new_memfd(4096), new_memfd(8192) }, i;
	int results[4];

	add_ioctl(IOMMU_IOAS_ALLOC, &alloc, sizeof(alloc));
	exchange(sock, NULL, 0);
	check(next_reply(&alloc, NULL).result == 0 && alloc.out_ioas_id == 1, "ioas alloc");

	map.ioas_id = alloc.out_ioas_id;
	for (i = 0; i < 3; i++) {
		map.fd = i < 2 ? i : -1; /* two that are sent, one that is not open */
		map.iova = 0x10000 * i;
		add_ioctl(IOMMU_IOAS_MAP_FILE, &map, sizeof(map));
	}
	add_ioctl(IOMMU_DESTROY, &gone, sizeof(gone));
	exchange(sock, fds, 2);
	for (i = 0; i < 4; i++)
		results[i] = next_reply(NULL, NULL).result;
	check(results[0] == 0 && results[1] == 0, "batch: two descriptors");
	check(results[2] == -EBADF, "batch: a bad descriptor");
	check(results[3] == -ENOENT, "batch: goes on behind an error");
	check(in_at == in_length, "batch: nothing more");
	close(fds[0]);
	close(fds[1]);
	return alloc.out_ioas_id;
}

static void unreadable_pointers(int sock, uint32_t ioas)
{
	struct allow_iovas allow = { sizeof(allow), ioas, 1, 0, 0xdead000 };

	add_request(IOCTL, REASON, IOMMU_IOAS_ALLOC, NONE);
	add_ioctl(IOMMU_IOAS_ALLOW_IOVAS, &allow, sizeof(allow)); /* no segment for allowed_iovas */
	exchange(sock, NULL, 0);
	check(next_reply(NULL, NULL).result == -EFAULT, "struct that cannot be read");
	check(next_reply(NULL, NULL).result == -EFAULT, "array that cannot be read");
}

static void scratch_file(int sock, uint32_t ioas)
{
	enum { COUNT = 20000, IN = 4096 };
	size_t size = COUNT * sizeof(struct iova_range);
	int fd = new_memfd(IN + size);
	char *map = mmap(NULL, IN + size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	struct iova_range *ranges = (struct iova_range *)(map + IN);
	struct allow_iovas allow = { sizeof(allow), ioas, COUNT, 0, 0x7000000 };
	struct iova_ranges ask = { sizeof(ask), ioas, COUNT, 0, 0x8000000, 0 };
	struct record record = { 0 };
	struct reply reply;
	size_t i;

	if (map == MAP_FAILED)
		die("mmap");
	add_request(SCRATCH, 0, 0, 0);
	exchange(sock, &fd, 1);
	check(next_reply(NULL, NULL).result == 0, "scratch file");
	close(fd);

	for (i = 0; i < COUNT; i++)
		ranges[i] = (struct iova_range){ 0x100000 + i * 0x2000, 0x100fff + i * 0x2000 };
	for (i = 0; i < 2; i++) {
		ranges[COUNT - 1].last = i ? UINT64_MAX : 0; /* the last of all is wrong at first */
		inline_segment(1, &allow, sizeof(allow), sizeof(allow));
		scratch_segment(allow.allowed_iovas, size, 0, IN);
		add_request(IOCTL, REASON, IOMMU_IOAS_ALLOW_IOVAS, 0);
		exchange(sock, NULL, 0);
		check(next_reply(NULL, NULL).result == (i ? 0 : -EINVAL), "an array larger than a packet, read to its end");
	}
	inline_segment(1, &ask, sizeof(ask), sizeof(ask));
	scratch_segment(ask.allowed_iovas, 0, size, IN);
	add_request(IOCTL, REASON, IOMMU_IOAS_IOVA_RANGES, 0);
	exchange(sock, NULL, 0);
	reply = next_reply(&ask, &record);
	check(reply.result == 0 && reply.writes == 2 && ask.num_iovas == 1, "an array larger than a packet, offered");
	check(record.segment + record.is_inline == 1, "one record inline, one not");
	check(ranges[0].start == 0 && ranges[0].last == UINT64_MAX, "what was written lies in the scratch file");
	check(ranges[1].start == 0x102000, "and no more than that");
	munmap(map, IN + size);
}

static void returned_descriptor(int sock)
{
	struct fault_alloc fault = { .size = sizeof(fault), .out_fault_fd = NONE };
	struct destroy destroy = { .size = sizeof(destroy) };
	char event[64];
	struct reply reply;
	int fd;

	add_ioctl(IOMMU_FAULT_QUEUE_ALLOC, &fault, sizeof(fault));
	exchange(sock, NULL, 0);
	reply = next_reply(&fault, NULL);
	check(reply.result == 0 && reply.fds == 1 && n_in_fds == 1 && fault.out_fault_fd == 0, "a returned descriptor");
	fd = in_fds[fault.out_fault_fd];

	inline_segment(0x1000, NULL, 0, sizeof(event));
	add_request(READ, 0, 0, sizeof(event));
	exchange(sock, &fd, 1);
	check(next_reply(NULL, NULL).result <= 0, "read of an empty queue");

	destroy.id = fault.out_fault_id;
	add_ioctl(IOMMU_DESTROY, &destroy, sizeof(destroy));
	exchange(sock, NULL, 0);
	check(next_reply(NULL, NULL).result == -EBUSY, "destroy while the descriptor is open");
	close(fd);
	add_ioctl(IOMMU_DESTROY, &destroy, sizeof(destroy));
	exchange(sock, NULL, 0);
	check(next_reply(NULL, NULL).result == 0, "destroy after its last close");
}

int main(int argc, char **argv)
{
	uint32_t ioas;
	int sock;

	if (argc != 2)
		return 2;
	sock = connect_to(argv[1]);
	ioas = batch_with_descriptors(sock);
	unreadable_pointers(sock, ioas);
	scratch_file(sock, ioas);
	returned_descriptor(sock);
	close(sock);
	return failures != 0;
}
