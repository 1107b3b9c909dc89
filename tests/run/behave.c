// behave: one process habit per name, as real programs have them, on /dev/iommu. Prints "ok" and exits 0, or says
// what was wrong and exits 1. Built static and dynamic by the tests; no header of iommufd is needed.
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

#define IOAS_MAP 0x3b85
#define FAULT_ALLOC 0x3b8e
#define TEST 0x3ba0

extern char **environ;
static char *self;

static int device(void)
{
	int fd = open("/dev/iommu", O_RDWR);
	CHECK(fd >= 0);
	return fd;
}

static void wait_ok(pid_t pid)
{
	int status;
	CHECK(waitpid(pid, &status, 0) == pid);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

// ---- threads ----

#define THREADS 8
#define EACH 300
static uint32_t ids[THREADS][EACH];
static int shared_fd;

static void *thread(void *arg)
{
	uint32_t *mine = arg;
	int own = device();
	for (int i = 0; i < EACH; i++) {
		mine[i] = ioas_alloc(shared_fd);
		CHECK(ioas_alloc(own) == (uint32_t)i + 1);
	}
	CHECK(close(own) == 0);
	return NULL;
}

static int compare(const void *a, const void *b)
{
	return *(const uint32_t *)a < *(const uint32_t *)b ? -1 : 1;
}

static void threads(void)
{
	pthread_t all[THREADS];
	shared_fd = device();
	for (int i = 0; i < THREADS; i++)
		CHECK(pthread_create(&all[i], NULL, thread, ids[i]) == 0);
	for (int i = 0; i < THREADS; i++)
		CHECK(pthread_join(all[i], NULL) == 0);
	qsort(ids, THREADS * EACH, sizeof(uint32_t), compare);
	for (int i = 0; i < THREADS * EACH; i++)
		CHECK(((uint32_t *)ids)[i] == (uint32_t)i + 1);
}

// ---- processes ----

static void forks(void)
{
	int fd = device();
	CHECK(ioas_alloc(fd) == 1);
	pid_t pid = fork();
	if (!pid) {
		CHECK(ioas_alloc(fd) == 2);
		_exit(0);
	}
	wait_ok(pid);
	CHECK(ioas_alloc(fd) == 3);
	for (int i = 0; i < 20; i++) { // grandchildren, each with an address space of its own
		pid = fork();
		if (!pid) {
			pid_t inner = fork();
			if (!inner) {
				CHECK(ioas_alloc(fd) == (uint32_t)(4 + i));
				_exit(0);
			}
			wait_ok(inner);
			_exit(0);
		}
		wait_ok(pid);
	}
}

static void execs(void)
{
	char number[16];
	int fd = device();
	CHECK(ioas_alloc(fd) == 1);
	snprintf(number, sizeof(number), "%d", fd);
	pid_t pid = fork();
	if (!pid) {
		ioas_alloc(fd); // so that the daemon knows us before the exec
		execl(self, self, "use", number, "3", NULL);
		_exit(99);
	}
	wait_ok(pid);
	CHECK(ioas_alloc(fd) == 4);
	pid = vfork();
	if (!pid) {
		execl(self, self, "use", number, "5", NULL);
		_exit(99);
	}
	wait_ok(pid);
	// posix_spawn: the child opens for reading and writing in our address space, then execs
	posix_spawn_file_actions_t actions;
	char *argv[] = { self, "use", "7", "1", NULL };
	posix_spawn_file_actions_init(&actions);
	posix_spawn_file_actions_addopen(&actions, 7, "/dev/iommu", O_RDWR, 0);
	CHECK(posix_spawn(&pid, self, &actions, NULL, argv, environ) == 0);
	wait_ok(pid);
	CHECK(ioas_alloc(fd) == 6);
	execl(self, self, "use", number, "7", NULL);
	_exit(99);
}

static void cloexec(void)
{
	int fd = open("/dev/iommu", O_RDWR | O_CLOEXEC);
	char number[16];
	CHECK(fd >= 0 && fcntl(fd, F_GETFD) == FD_CLOEXEC);
	snprintf(number, sizeof(number), "%d", fd);
	execl(self, self, "badf", number, NULL);
	_exit(99);
}

static void use(int fd, uint32_t expected)
{
	CHECK(ioas_alloc(fd) == expected);
}

static void badf(int fd)
{
	uint32_t cmd[3] = { sizeof(cmd), 0, 0 };
	CHECK(ioctl(fd, IOAS_ALLOC, cmd) == -1 && errno == EBADF);
}

// ---- descriptors ----

static void dups(void)
{
	int fd = device();
	CHECK(ioas_alloc(fd) == 1);
	int a = dup(fd), b = fcntl(fd, F_DUPFD_CLOEXEC, 0), c = fcntl(fd, F_DUPFD, 950), d = dup2(fd, 50);
	CHECK(a >= 0 && a != fd && b >= 0 && c >= 950 && d == 50);
	CHECK(fcntl(a, F_GETFD) == 0 && fcntl(b, F_GETFD) == FD_CLOEXEC && fcntl(c, F_GETFD) == 0);
	CHECK(close(fd) == 0);
	CHECK(ioas_alloc(a) == 2 && ioas_alloc(b) == 3 && ioas_alloc(c) == 4 && ioas_alloc(d) == 5);
	int others[3] = { dup(1), dup(1), fcntl(1, F_DUPFD, 960) };
	CHECK(others[0] < 900 && others[2] >= 960);
	char text = 0;
	CHECK(read(a, &text, 1) == -1 && errno == EINVAL);
	CHECK(write(a, &text, 1) == -1 && errno == EINVAL);
	CHECK(lseek(a, 0, SEEK_SET) == -1 && errno == ESPIPE);
	CHECK(pread(a, &text, 1, 0) == -1 && errno == EINVAL);
	struct pollfd p = { .fd = a, .events = POLLIN | POLLOUT };
	CHECK(poll(&p, 1, 0) == 1 && p.revents == (POLLIN | POLLOUT));
	CHECK(close(a) == 0 && close(b) == 0 && close(c) == 0);
	CHECK(ioas_alloc(d) == 6); // the last one still has it all
	CHECK(destroy(d, 1) == 0);
}

static void send_fd(int sock, int fd)
{
	char text = 'x', control[CMSG_SPACE(sizeof(int))] = { 0 };
	struct iovec iov = { &text, 1 };
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control,
			      .msg_controllen = sizeof(control) };
	struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
	c->cmsg_level = SOL_SOCKET;
	c->cmsg_type = SCM_RIGHTS;
	c->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(c), &fd, sizeof(int));
	CHECK(sendmsg(sock, &msg, 0) == 1);
}

static int receive_fd(int sock)
{
	char text, control[CMSG_SPACE(sizeof(int))];
	struct iovec iov = { &text, 1 };
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control,
			      .msg_controllen = sizeof(control) };
	int fd;
	CHECK(recvmsg(sock, &msg, 0) == 1);
	memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&msg)), sizeof(int));
	return fd;
}

static void rights(void)
{
	int pair[2];
	CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
	pid_t pid = fork();
	if (!pid) {
		int got = receive_fd(pair[1]);
		CHECK(ioas_alloc(got) == 2);
		_exit(0);
	}
	int fd = device();
	CHECK(ioas_alloc(fd) == 1);
	send_fd(pair[0], fd);
	CHECK(close(fd) == 0); // in flight, or with the child: still open
	wait_ok(pid);
}

static void queue(void)
{
	int fd = device();
	uint32_t cmd[4] = { sizeof(cmd), 0, 0, 0 };
	CHECK(ioctl(fd, FAULT_ALLOC, cmd) == 0);
	int file = cmd[3];
	uint8_t record[64];
	CHECK(fcntl(file, F_GETFD) == FD_CLOEXEC);
	struct pollfd p = { .fd = file, .events = POLLIN | POLLOUT };
	CHECK(poll(&p, 1, 0) == 1 && p.revents == POLLOUT);
	CHECK(read(file, record, 40) == 0);
	CHECK(write(file, record, 7) == -1 && errno == ESPIPE);
	struct iovec iov[2] = { { record, 40 }, { record, 8 } };
	CHECK(readv(file, iov, 2) == 0);
	CHECK(pread(file, record, 40, 0) == -1 && errno == ESPIPE);
	CHECK(lseek(file, 0, SEEK_CUR) == -1 && errno == ESPIPE);
	uint32_t none[3] = { sizeof(none), 0, 0 };
	CHECK(ioctl(file, IOAS_ALLOC, none) == -1 && errno == ENOTTY);
	CHECK(mmap(NULL, 4096, PROT_READ, MAP_SHARED, file, 0) == MAP_FAILED && errno == ENODEV);
	CHECK(destroy(fd, cmd[2]) == -1 && errno == EBUSY);
	CHECK(close(file) == 0);
	CHECK(destroy(fd, cmd[2]) == 0);
	CHECK(close(fd) == 0);
}

static void full(void) // every number from the base on is taken
{
	struct rlimit limit = { 1024, 1024 };
	CHECK(setrlimit(RLIMIT_NOFILE, &limit) == 0);
	int low = dup(1);
	for (int i = 3; i < 1024; i++)
		if (fcntl(i, F_GETFD) == -1)
			CHECK(dup2(low, i) == i);
	CHECK(open("/dev/iommu", O_RDWR) == -1 && errno == EMFILE);
	CHECK(close(5) == 0);
	int fd = open("/dev/iommu", O_RDWR);
	CHECK(fd == 5 && ioas_alloc(fd) == 1);
	CHECK(fcntl(1000, F_GETFD) == 0);
}

// ---- signals ----

static volatile int ticks;

static void tick(int number)
{
	ticks++;
}

static void alarms(int flags)
{
	struct sigaction act = { .sa_handler = tick, .sa_flags = flags };
	struct itimerval often = { { 0, 500 }, { 0, 500 } };
	int fd = device();
	CHECK(sigaction(SIGALRM, &act, NULL) == 0);
	CHECK(setitimer(ITIMER_REAL, &often, NULL) == 0);
	for (uint32_t i = 1; i <= 4000; i++) {
		uint32_t cmd[3] = { sizeof(cmd), 0, 0 };
		int rc = ioctl(fd, IOAS_ALLOC, cmd);
		if (rc && !flags && errno == EINTR) { // before the daemon has taken the call: nothing was done
			i--;
			continue;
		}
		CHECK(rc == 0 && cmd[2] == i); // never carried out twice
	}
	CHECK(ticks > 0);
}

// ---- as Go has it: no libc in between ----

static void raw(void)
{
	uint32_t cmd[3] = { sizeof(cmd), 0, 0 };
	long fd = syscall(SYS_openat, AT_FDCWD, "/dev/iommu", O_RDWR | O_CLOEXEC, 0);
	CHECK(fd >= 0);
	CHECK(syscall(SYS_ioctl, fd, (unsigned long)IOAS_ALLOC, cmd) == 0 && cmd[2] == 1);
	struct { uint64_t flags, mode, resolve; } how = { O_RDWR | O_CLOEXEC, 0, 0 };
	long other = syscall(437, AT_FDCWD, "/dev/iommu", &how, sizeof(how));
	CHECK(other >= 0 && other != fd);
	CHECK(syscall(SYS_ioctl, other, (unsigned long)IOAS_ALLOC, cmd) == 0 && cmd[2] == 1);
	int folder = open("/dev", O_RDONLY | O_DIRECTORY);
	CHECK((other = openat(folder, "iommu", O_RDWR)) >= 0);
	CHECK(open("/dev/../dev//iommu", O_RDWR) >= 0);
	CHECK(chdir("/dev") == 0 && (other = open("iommu", O_RDWR)) >= 0);
	CHECK(open("/dev/iommu", O_RDWR | O_CREAT | O_EXCL, 0600) == -1 && errno == EEXIST);
	CHECK(open("/dev/iommux", O_RDWR) == -1 && errno == ENOENT);
	CHECK(open("/dev/vfio/vfio", O_RDWR) >= 0);
	CHECK(open((char *)8, O_RDWR) == -1 && errno == EFAULT);
	CHECK(open("/dev/null", O_RDWR) >= 0);
	CHECK(ioctl(other, IOAS_ALLOC, NULL) == -1 && errno == EFAULT);
}

// ---- memory ----

static int map(int fd, uint32_t ioas, void *addr, uint64_t length)
{
	struct { uint32_t size, flags, ioas, reserved; uint64_t va, length, iova; } cmd = {
		sizeof(cmd), 6, ioas, 0, (uintptr_t)addr, length, 0
	};
	return ioctl(fd, IOAS_MAP, &cmd);
}

static void memory(void)
{
	int fd = device();
	uint32_t ioas = ioas_alloc(fd);
	uint32_t mock[18] = { sizeof(mock), 2, ioas };
	CHECK(ioctl(fd, TEST, mock) == 0);
	size_t size = 1 << 16;
	char *shared = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	char *private = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char *fixed = mmap(NULL, size, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(map(fd, ioas, shared, size) == 0);
	CHECK(map(fd, ioas, private, size) == 0);
	CHECK(map(fd, ioas, fixed, size) == -1 && errno == EFAULT);
	CHECK(munmap(private + 4096, 4096) == 0);
	CHECK(map(fd, ioas, private, size) == -1 && errno == EFAULT);
	CHECK(map(fd, ioas, (void *)0x10000, size) == -1 && errno == EFAULT);
	CHECK(munmap(shared, size) == 0);
	// a struct that ends where readable memory does, and one in memory that cannot be read or written
	char *edge = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(mprotect(edge + 4096, 4096, PROT_NONE) == 0);
	uint32_t *cmd = (uint32_t *)(edge + 4096 - 12);
	cmd[0] = 12, cmd[1] = 0;
	CHECK(ioctl(fd, IOAS_ALLOC, cmd) == 0);
	CHECK(ioctl(fd, IOAS_ALLOC, cmd + 1) == -1 && errno == EINVAL);
	CHECK(ioctl(fd, IOAS_ALLOC, edge + 4096) == -1 && errno == EFAULT);
	CHECK(mprotect(edge, 4096, PROT_READ) == 0);
	cmd = NULL;
	CHECK(ioctl(fd, IOAS_ALLOC, edge + 4096 - 12) == -1 && errno == EFAULT);
}

// ---- for the tests that kill ----

static void hold(void)
{
	int fd = device();
	ioas_alloc(fd);
	printf("ready\n");
	fflush(stdout);
	pause();
}

static void outlived(void) // the daemon dies meanwhile
{
	uint32_t cmd[3] = { sizeof(cmd), 0, 0 };
	int fd = device();
	printf("ready\n");
	fflush(stdout);
	while (ioctl(fd, IOAS_ALLOC, cmd) == 0)
		;
	CHECK(errno == ENODEV);
	CHECK(ioctl(fd, IOAS_ALLOC, cmd) == -1 && errno == ENODEV);
	CHECK(open("/dev/iommu", O_RDWR) == -1 && errno == ENODEV);
	CHECK(open("/dev/null", O_RDWR) >= 0);
	CHECK(close(fd) == 0);
}

static void orphan(const char *path, int told)
{
	int fd = device();
	CHECK(ioas_alloc(fd) == 1);
	if (fork())
		exit(7);
	if (told)
		CHECK(read(0, &told, 1) == 1);
	else
		usleep(700 * 1000);
	int works = ioas_alloc(fd) == 2 && device() >= 0;
	FILE *out = fopen(path, "w");
	fprintf(out, "%s\n", works ? "served" : "not served");
	fclose(out);
	_exit(0);
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "";
	self = argv[0];
	if (!strcmp(what, "threads"))
		threads();
	else if (!strcmp(what, "forks"))
		forks();
	else if (!strcmp(what, "execs"))
		execs();
	else if (!strcmp(what, "cloexec"))
		cloexec();
	else if (!strcmp(what, "use"))
		use(atoi(argv[2]), atoi(argv[3]));
	else if (!strcmp(what, "badf"))
		badf(atoi(argv[2]));
	else if (!strcmp(what, "dups"))
		dups();
	else if (!strcmp(what, "rights"))
		rights();
	else if (!strcmp(what, "queue"))
		queue();
	else if (!strcmp(what, "full"))
		full();
	else if (!strcmp(what, "alarms"))
		alarms(SA_RESTART);
	else if (!strcmp(what, "interrupts"))
		alarms(0);
	else if (!strcmp(what, "raw"))
		raw();
	else if (!strcmp(what, "memory"))
		memory();
	else if (!strcmp(what, "hold"))
		hold();
	else if (!strcmp(what, "outlived"))
		outlived();
	else if (!strcmp(what, "orphan"))
		orphan(argv[2], argc > 3);
	else
		return 2;
	printf("ok\n");
	return 0;
}
