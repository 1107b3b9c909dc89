// calls WHAT COUNT: seconds for one call, bare or under `iommufdctl run` or `mount --exact`.
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static int once(const char *what, int fd)
{
	uint32_t alloc[3] = { sizeof(alloc), 0, 0 }, destroy[2] = { sizeof(destroy), 0 };
	char byte;

	if (!strcmp(what, "ioctl")) { // IOMMU_IOAS_ALLOC, IOMMU_DESTROY: two calls
		int rc = ioctl(fd, 0x3b81, alloc);
		destroy[1] = alloc[2];
		return rc || ioctl(fd, 0x3b80, destroy);
	}
	if (!strcmp(what, "read"))
		return read(fd, &byte, 1) != 1;
	if (!strcmp(what, "mmap")) {
		void *at = mmap(0, 4096, PROT_READ, MAP_PRIVATE, fd, 0);
		return at == MAP_FAILED || munmap(at, 4096);
	}
	fd = open("/dev/null", !strcmp(what, "rdwr") ? O_RDWR : O_RDONLY);
	return fd < 0 || close(fd);
}

int main(int argc, char **argv)
{
	int count = atoi(argv[2]), fd = -1;

	fd = open("/dev/iommu", O_RDWR); // under run this waits until the daemon has started
	if (strcmp(argv[1], "ioctl"))
		fd = open("/dev/zero", O_RDONLY);
	double start = now();
	for (int i = 0; i < count; i++)
		if (fd < 0 || once(argv[1], fd))
			return 1;
	printf("%.9f\n", (now() - start) / count / (strcmp(argv[1], "ioctl") ? 1 : 2));
	return 0;
}
