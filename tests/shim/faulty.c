/* Faults of the file system and jumps of the clock, for a process that is started with this as LD_PRELOAD.
 *
 * FAULTY_CONTROL names a file of six 32-bit numbers that the tests change while the process runs:
 *   0  of a thousand writes, so many end in ENOSPC
 *   1  of a thousand syncs, so many end in EIO
 *   2  of a thousand reads, so many are short
 *   3  seconds that the wall clock is ahead, signed
 *   4  a seed
 *   5  faults so far, counted here
 * Only files below the directory in FAULTY_ROOT are touched; of these only those whose names end with FAULTY_ENDING, if
 * there is one. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static volatile int32_t *control;
static const char *root;
static size_t root_len;
static const char *ending;

__attribute__((constructor)) static void start(void) {
    const char *path = getenv("FAULTY_CONTROL");
    root = getenv("FAULTY_ROOT");
    ending = getenv("FAULTY_ENDING");
    if (!path || !root) return;
    root_len = strlen(root);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0) return;
    void *map = mmap(0, 6 * sizeof(int32_t), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (map != MAP_FAILED) control = map;
}

static int draw(int which) {
    static __thread uint64_t state;
    if (!control || control[which] <= 0) return 0;
    if (!state) state = (uint64_t)control[4] * 2654435761u + (uint64_t)(uintptr_t)&state + 1;
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (int)((state >> 33) % 1000) < control[which];
}

static int ours(int fd) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t len = readlink(link, path, sizeof path - 1);
    size_t end = ending ? strlen(ending) : 0;
    if (len > 0 && ((size_t)len < end || strncmp(path + len - end, ending ? ending : "", end))) return 0;
    return len > 0 && (size_t)len > root_len && !strncmp(path, root, root_len);
}

static void count(void) { __sync_fetch_and_add((int32_t *)&control[5], 1); }

#define REAL(name) ({ static void *real; if (!real) real = dlsym(RTLD_NEXT, #name); (__typeof__(&name))real; })

ssize_t write(int fd, const void *bytes, size_t len) {
    if (draw(0) && ours(fd)) { count(); errno = ENOSPC; return -1; }
    return REAL(write)(fd, bytes, len);
}

ssize_t writev(int fd, const struct iovec *parts, int n) {
    if (draw(0) && ours(fd)) { count(); errno = ENOSPC; return -1; }
    return REAL(writev)(fd, parts, n);
}

int fsync(int fd) {
    if (draw(1) && ours(fd)) { count(); errno = EIO; return -1; }
    return REAL(fsync)(fd);
}

int fdatasync(int fd) {
    if (draw(1) && ours(fd)) { count(); errno = EIO; return -1; }
    return REAL(fdatasync)(fd);
}

ssize_t read(int fd, void *bytes, size_t len) {
    if (len > 1 && draw(2) && ours(fd)) { count(); len = 1 + len / 3; }
    return REAL(read)(fd, bytes, len);
}

ssize_t pread64(int fd, void *bytes, size_t len, off64_t at) {
    if (len > 1 && draw(2) && ours(fd)) { count(); len = 1 + len / 3; }
    return REAL(pread64)(fd, bytes, len, at);
}

int clock_gettime(clockid_t clock, struct timespec *time) {
    int result = REAL(clock_gettime)(clock, time);
    if (!result && clock == CLOCK_REALTIME && control) time->tv_sec += control[3];
    return result;
}
