/* A disk that fills, breaks or is slow, and a clock that jumps, for one process tree: LD_PRELOAD of tests/attack/soak.py.

   SOAK_DIR      files below this folder are concerned
   SOAK_ERRNO    writes to them fail with this number, once SOAK_AFTER bytes were written by this process
   SOAK_SLOW_US  every fsync of them takes so many microseconds more
   SOAK_JUMP     seconds by which the wall clock is off, from SOAK_JUMP_AFTER seconds after the first look on */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static atomic_long written;

static long number(const char *name) {
    const char *value = getenv(name);
    return value ? atol(value) : 0;
}

static int concerned(int fd) {
    char link[64], path[4096];
    const char *folder = getenv("SOAK_DIR");
    if (!folder) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n <= 0) return 0;
    path[n] = 0;
    return strncmp(path, folder, strlen(folder)) == 0;
}

static int fails(int fd, size_t size) {
    long error = number("SOAK_ERRNO");
    if (!error || !concerned(fd)) return 0;
    if (atomic_fetch_add(&written, (long)size) + (long)size <= number("SOAK_AFTER")) return 0;
    errno = (int)error;
    return 1;
}

ssize_t write(int fd, const void *data, size_t size) {
    static ssize_t (*real)(int, const void *, size_t);
    if (!real) real = dlsym(RTLD_NEXT, "write");
    return fails(fd, size) ? -1 : real(fd, data, size);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    static ssize_t (*real)(int, const void *, size_t, off64_t);
    if (!real) real = dlsym(RTLD_NEXT, "pwrite64");
    return fails(fd, size) ? -1 : real(fd, data, size, at);
}

ssize_t writev(int fd, const struct iovec *pieces, int count) {
    static ssize_t (*real)(int, const struct iovec *, int);
    size_t size = 0;
    if (!real) real = dlsym(RTLD_NEXT, "writev");
    for (int i = 0; i < count; i++) size += pieces[i].iov_len;
    return fails(fd, size) ? -1 : real(fd, pieces, count);
}

int fsync(int fd) {
    static int (*real)(int);
    if (!real) real = dlsym(RTLD_NEXT, "fsync");
    long slow = number("SOAK_SLOW_US");
    if (slow && concerned(fd)) usleep((useconds_t)slow);
    return fails(fd, 0) ? -1 : real(fd);
}

static int (*clock_of)(clockid_t, struct timespec *);
static atomic_long first; /* the first look, in seconds of the monotonic clock, and one */

static long off(void) {
    long jump = number("SOAK_JUMP"), none = 0;
    struct timespec now;
    if (!jump) return 0;
    clock_of(CLOCK_MONOTONIC, &now);
    atomic_compare_exchange_strong(&first, &none, now.tv_sec + 1);
    return now.tv_sec + 1 - atomic_load(&first) >= number("SOAK_JUMP_AFTER") ? jump : 0;
}

int clock_gettime(clockid_t which, struct timespec *out) {
    if (!clock_of) clock_of = dlsym(RTLD_NEXT, "clock_gettime");
    int result = clock_of(which, out);
    if (!result && which == CLOCK_REALTIME) out->tv_sec += off();
    return result;
}
