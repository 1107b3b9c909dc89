/*
 * Round trips over SOCK_SEQPACKET, timed in C.
 *
 *   pingpong pair CPU PEER_CPU COUNT REQUEST_BYTES REPLY_BYTES
 *       against a child that does nothing but answer: the floor
 *   pingpong call CPU COUNT PATH HELLO_BYTES REPLY_BYTES < HELLO REQUEST
 *       against the daemon at PATH: HELLO once, then REQUEST over and over
 *
 * Prints the nanoseconds of one round trip: the median of stretches of 20, so that another process which takes
 * the CPU for a few milliseconds does not count.
 */
#define _GNU_SOURCE
#include <err.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define WARM_UP 200
#define STRETCH 20
#define MAX_PACKET 131072

static char request[MAX_PACKET], reply[MAX_PACKET];

static void pin(int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	if (sched_setaffinity(0, sizeof(set), &set))
		err(1, "sched_setaffinity");
}

static double now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1e9 + ts.tv_nsec;
}

static void trips(int sock, long count, size_t request_bytes, size_t reply_bytes)
{
	for (long i = 0; i < count; i++) {
		if (send(sock, request, request_bytes, 0) != (ssize_t)request_bytes)
			err(1, "send");
		if (recv(sock, reply, sizeof(reply), 0) != (ssize_t)reply_bytes)
			errx(1, "not the reply that was expected");
	}
}

static int compare(const void *a, const void *b)
{
	return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b);
}

static void report(int sock, long count, size_t request_bytes, size_t reply_bytes)
{
	long stretches = (count + STRETCH - 1) / STRETCH;
	double *times = calloc(stretches, sizeof(*times)), start;

	if (!times)
		err(1, "calloc");
	trips(sock, WARM_UP, request_bytes, reply_bytes);
	for (long i = 0; i < stretches; i++) {
		start = now();
		trips(sock, STRETCH, request_bytes, reply_bytes);
		times[i] = (now() - start) / STRETCH;
	}
	qsort(times, stretches, sizeof(*times), compare);
	printf("%.1f\n", times[stretches / 2]);
	free(times);
}

static void echo(int sock, size_t reply_bytes)
{
	while (recv(sock, request, sizeof(request), 0) > 0)
		if (send(sock, reply, reply_bytes, 0) != (ssize_t)reply_bytes)
			_exit(1);
	_exit(0);
}

static int pair(char **args)
{
	size_t request_bytes = atol(args[3]), reply_bytes = atol(args[4]);
	int ends[2];

	if (socketpair(AF_UNIX, SOCK_SEQPACKET, 0, ends))
		err(1, "socketpair");
	if (!fork()) {
		close(ends[0]);
		pin(atoi(args[1]));
		echo(ends[1], reply_bytes);
	}
	close(ends[1]);
	pin(atoi(args[0]));
	report(ends[0], atol(args[2]), request_bytes, reply_bytes);
	close(ends[0]);
	wait(NULL);
	return 0;
}

static int call(char **args)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	size_t hello_bytes = atol(args[3]), reply_bytes = atol(args[4]), size;
	int sock = socket(AF_UNIX, SOCK_SEQPACKET, 0);
	int32_t result;

	pin(atoi(args[0]));
	strncpy(address.sun_path, args[2], sizeof(address.sun_path) - 1);
	if (sock < 0 || connect(sock, (struct sockaddr *)&address, sizeof(address)))
		err(1, "%s", args[2]);
	size = fread(request, 1, sizeof(request), stdin);
	if (size <= hello_bytes || send(sock, request, hello_bytes, 0) < 0 || recv(sock, reply, sizeof(reply), 0) <= 0)
		errx(1, "no hello");
	memmove(request, request + hello_bytes, size - hello_bytes);
	report(sock, atol(args[1]), size - hello_bytes, reply_bytes);
	memcpy(&result, reply + 4, sizeof(result));
	if (result)
		errx(1, "the daemon answered %d", result);
	return 0;
}

int main(int argc, char **argv)
{
	if (argc == 7 && !strcmp(argv[1], "pair"))
		return pair(argv + 2);
	if (argc == 7 && !strcmp(argv[1], "call"))
		return call(argv + 2);
	errx(2, "usage: see the head of pingpong.c");
}
