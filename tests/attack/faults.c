/* A disk that fills, breaks, is slow or takes half of what it is given, and a clock that is set, for a tree of
   processes: LD_PRELOAD of tests/attack/soak.py.

   SOAK_DIR         files at or below this folder are concerned
   SOAK_FAILS       which calls fail: any of w (write), s (fsync), r (rename)
   SOAK_ERRNO       with which number
   SOAK_AFTER       after so many bytes that this process wrote
   SOAK_WHEN        and only while this file exists; unset: always
   SOAK_SHORT       1: a write takes half of what it is given
   SOAK_SLOW_US     each fsync takes so many microseconds more
   SOAK_JUMP        seconds by which the wall clock is off ...
   SOAK_JUMP_AFTER  ... so many seconds after this process looked at it first
   SOAK_MARK        a file that gets a letter when something of this comes about in a process for the first time */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static atomic_long written;

static long number(const char *name) {
    const char *value = getenv(name);
    return value ? atol(value) : 0;
}

static void mark(char what) {
    static atomic_int marked[128];
    const char *path = getenv("SOAK_MARK");
    if (!path || atomic_exchange(&marked[(int)what], 1)) return;
    int before = errno, fd = (int)syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
    if (fd >= 0) {
        if (syscall(SYS_write, fd, &what, 1) != 1) atomic_store(&marked[(int)what], 0);
        syscall(SYS_close, fd);
    }
    errno = before;
}

static int below(const char *path) {
    const char *folder = getenv("SOAK_DIR");
    if (!folder) return 0;
    size_t n = strlen(folder);
    return strncmp(path, folder, n) == 0 && (path[n] == '/' || path[n] == 0);
}

static int concerned(int fd) {
    char link[64], path[4096];
    if (!getenv("SOAK_DIR")) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n <= 0) return 0;
    path[n] = 0;
    return below(path);
}

/* Whether a call that concerns us and moves `size` bytes fails; sets errno. */
static int fails(char call, size_t size) {
    const char *calls = getenv("SOAK_FAILS"), *when = getenv("SOAK_WHEN");
    long so_far = atomic_fetch_add(&written, (long)size) + (long)size;
    if (!calls || !strchr(calls, call) || so_far <= number("SOAK_AFTER")) return 0;
    if (when && access(when, F_OK)) return 0;
    mark(call);
    errno = (int)number("SOAK_ERRNO");
    return 1;
}

static size_t taken(size_t size) {
    if (size < 2 || !number("SOAK_SHORT")) return size;
    mark('h');
    return size / 2;
}

ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    if (!concerned(fd)) return real(fd, data, size);
    return fails('w', size) ? -1 : real(fd, data, taken(size));
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    REAL(pwrite);
    if (!concerned(fd)) return real(fd, data, size, at);
    return fails('w', size) ? -1 : real(fd, data, taken(size), at);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    REAL(pwrite64);
    if (!concerned(fd)) return real(fd, data, size, at);
    return fails('w', size) ? -1 : real(fd, data, taken(size), at);
}

ssize_t writev(int fd, const struct iovec *pieces, int count) {
    REAL(writev);
    size_t size = 0;
    for (int i = 0; i < count; i++) size += pieces[i].iov_len;
    if (!concerned(fd)) return real(fd, pieces, count);
    return fails('w', size) ? -1 : real(fd, pieces, count);
}

int fsync(int fd) {
    REAL(fsync);
    if (!concerned(fd)) return real(fd);
    long slow = number("SOAK_SLOW_US");
    if (slow) mark('l'), usleep((useconds_t)slow);
    return fails('s', 0) ? -1 : real(fd);
}

int fdatasync(int fd) {
    REAL(fdatasync);
    if (!concerned(fd)) return real(fd);
    long slow = number("SOAK_SLOW_US");
    if (slow) mark('l'), usleep((useconds_t)slow);
    return fails('s', 0) ? -1 : real(fd);
}

int rename(const char *from, const char *to) {
    REAL(rename);
    return below(to) && fails('r', 0) ? -1 : real(from, to);
}

int renameat(int in, const char *from, int out, const char *to) {
    REAL(renameat);
    return below(to) && fails('r', 0) ? -1 : real(in, from, out, to);
}

/* By how many seconds the wall clock is off by now. */
static long off(void) {
    static atomic_long first; /* the first look, in seconds of the monotonic clock, and one */
    long jump = number("SOAK_JUMP"), none = 0;
    struct timespec now;
    if (!jump) return 0;
    syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &now);
    atomic_compare_exchange_strong(&first, &none, now.tv_sec + 1);
    if (now.tv_sec + 1 - atomic_load(&first) < number("SOAK_JUMP_AFTER")) return 0;
    mark('c');
    return jump;
}

int clock_gettime(clockid_t which, struct timespec *out) {
    REAL(clock_gettime);
    int result = real(which, out);
    if (!result && (which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE)) out->tv_sec += off();
    return result;
}

int gettimeofday(struct timeval *out, void *zone) {
    REAL(gettimeofday);
    int result = real(out, zone);
    if (!result) out->tv_sec += off();
    return result;
}

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}
