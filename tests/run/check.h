// What the C programs share: a check that says where it failed, and the ioctls of iommufd that all of them need.
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>

#define DESTROY 0x3b80
#define IOAS_ALLOC 0x3b81

#define CHECK(x)                                                                       \
	do {                                                                           \
		if (!(x)) {                                                            \
			printf("line %d: %s (errno %d)\n", __LINE__, #x, errno);       \
			fflush(stdout);                                                \
			exit(1);                                                       \
		}                                                                      \
	} while (0)
#define FAILS(x, number) CHECK((x) == -1 && errno == (number))

static uint32_t ioas_alloc(int fd)
{
	uint32_t cmd[3] = { sizeof(cmd), 0, 0 };
	CHECK(ioctl(fd, IOAS_ALLOC, cmd) == 0);
	return cmd[2];
}

static int destroy(int fd, uint32_t id)
{
	uint32_t cmd[2] = { sizeof(cmd), id };
	return ioctl(fd, DESTROY, cmd);
}
