// Faults at the n-th change of a file: preloaded (LD_PRELOAD) into a process, it counts the system calls that change files below
// one folder, in that process and its children together, and at call `at` kills the caller (SIGKILL), lets the call fail, or takes
// a file away.
//
//   cc -shared -fPIC -O1 -o faults.so faults.c -ldl
//
// FAULTS names a file of sizeof(struct plan) bytes, mapped by everyone who takes part. A write that is killed has written half.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OFF, COUNT, KILL, FAIL_ONCE, FAIL_FROM, MOVE };

struct plan {            // tests/reliability/faults.py writes the same layout
    _Atomic int mode;
    int error;           // errno of a failing call
    int no_renameat2;    // 1: the file system knows no exchange of names
    int unused;
    _Atomic long count;  // changes so far
    long at;             // 1-based
    char root[4096];     // only below this folder, without a slash at its end
    char victim[4096];   // MOVE: what is renamed to itself with `.gone`
};

static struct plan *plan;

__attribute__((constructor)) static void attach(void) {
    const char *path = getenv("FAULTS");
    int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, "open");
    int file = path ? real(path, O_RDWR | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *map = mmap(NULL, sizeof(struct plan), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (map != MAP_FAILED) plan = map;
}

static int below(const char *path) {
    size_t length = strlen(plan->root);
    return strncmp(path, plan->root, length) == 0 && (path[length] == '/' || path[length] == 0);
}

static int path_counts(int folder, const char *path) {
    if (!plan || plan->mode == OFF || !path) return 0;
    if (path[0] == '/') return below(path);
    char link[64], base[PATH_MAX] = "";
    if (folder == AT_FDCWD) return getcwd(base, sizeof base) && below(base);
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t n = readlink(link, base, sizeof base - 1);
    return n > 0 && (base[n] = 0, below(base));
}

static int fd_counts(int file) {
    if (!plan || plan->mode == OFF) return 0;
    struct stat status;
    if (fstat(file, &status) != 0 || (!S_ISREG(status.st_mode) && !S_ISDIR(status.st_mode))) return 0;
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t n = readlink(link, path, sizeof path - 1);
    return n > 0 && (path[n] = 0, below(path));
}

// 0: go on; 1: fail with errno set; 2: the caller is to die (after half a write)
static int judge(int removes) {
    long now = ++plan->count;
    if (plan->mode == KILL && now == plan->at) return 2;
    if (plan->mode == MOVE && now == plan->at) {
        char gone[4200];
        snprintf(gone, sizeof gone, "%s.gone", plan->victim);
        ((__typeof__(&rename))dlsym(RTLD_NEXT, "rename"))(plan->victim, gone);
    }
    if (removes && plan->error == ENOSPC) return 0;  // a full disk lets files go
    if ((plan->mode == FAIL_ONCE && now == plan->at) || (plan->mode == FAIL_FROM && now >= plan->at)) {
        errno = plan->error;
        return 1;
    }
    return 0;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define JUDGE(counts, removes)                \
    if (counts) {                             \
        int what = judge(removes);            \
        if (what == 2) raise(SIGKILL);        \
        if (what == 1) return -1;             \
    }

static int writes(int flags) { return (flags & O_ACCMODE) != O_RDONLY || (flags & O_CREAT); }

#define OPENER(name)                                              \
    int name(const char *path, int flags, ...) {                  \
        va_list list;                                             \
        va_start(list, flags);                                    \
        mode_t mode = (flags & (O_CREAT | __O_TMPFILE)) ? va_arg(list, mode_t) : 0; \
        va_end(list);                                             \
        JUDGE(writes(flags) && path_counts(AT_FDCWD, path), 0)       \
        return REAL(name)(path, flags, mode);                     \
    }
OPENER(open)
OPENER(open64)

#define OPENERAT(name)                                            \
    int name(int folder, const char *path, int flags, ...) {      \
        va_list list;                                             \
        va_start(list, flags);                                    \
        mode_t mode = (flags & (O_CREAT | __O_TMPFILE)) ? va_arg(list, mode_t) : 0; \
        va_end(list);                                             \
        JUDGE(writes(flags) && path_counts(folder, path), 0)         \
        return REAL(name)(folder, path, flags, mode);             \
    }
OPENERAT(openat)
OPENERAT(openat64)

#define FOPENER(name)                                             \
    FILE *name(const char *path, const char *mode) {              \
        if (strpbrk(mode, "wa+") && path_counts(AT_FDCWD, path)) { \
            int what = judge(0);                                 \
            if (what == 2) raise(SIGKILL);                        \
            if (what == 1) return NULL;                           \
        }                                                         \
        return REAL(name)(path, mode);                            \
    }
FOPENER(fopen)
FOPENER(fopen64)

#define WRITER(name, parameters, arguments, half)                 \
    ssize_t name parameters {                                     \
        if (fd_counts(file)) {                                    \
            int what = judge(0);                                 \
            if (what == 1) return -1;                             \
            if (what == 2) {                                      \
                half;                                             \
                raise(SIGKILL);                                   \
            }                                                     \
        }                                                         \
        return REAL(name) arguments;                              \
    }
WRITER(write, (int file, const void *data, size_t size), (file, data, size), (void)!REAL(write)(file, data, size / 2))
WRITER(pwrite, (int file, const void *data, size_t size, off_t at), (file, data, size, at),
       (void)!REAL(pwrite)(file, data, size / 2, at))
WRITER(pwrite64, (int file, const void *data, size_t size, off64_t at), (file, data, size, at),
       (void)!REAL(pwrite64)(file, data, size / 2, at))
WRITER(writev, (int file, const struct iovec *parts, int count), (file, parts, count),
       (void)!REAL(writev)(file, parts, count / 2))
WRITER(sendfile, (int file, int from, off_t *at, size_t size), (file, from, at, size),
       (void)!REAL(sendfile)(file, from, at, size / 2))
WRITER(sendfile64, (int file, int from, off64_t *at, size_t size), (file, from, at, size),
       (void)!REAL(sendfile64)(file, from, at, size / 2))

// stdio writes past the interposed write, from inside the C library; NumPy's tofile comes here, often with one element a call,
// so a call counts when it begins a stream or makes up another block of it
enum { BLOCK = 8192 };
size_t fwrite(const void *data, size_t size, size_t count, FILE *stream) {
    static __thread FILE *last;
    static __thread size_t pending;
    if (plan && plan->mode != OFF) {
        pending = stream == last ? pending + size * count : BLOCK;
        last = stream;
        if (pending >= BLOCK && fd_counts(fileno(stream))) {
            pending = 0;
            int what = judge(0);
            if (what == 1) return 0;
            if (what == 2) {
                REAL(fwrite)(data, size, count / 2, stream);
                fflush(stream);
                raise(SIGKILL);
            }
        }
    }
    static __typeof__(&fwrite) real;
    if (!real) real = REAL(fwrite);
    return real(data, size, count, stream);
}

#define CALL(type, name, parameters, arguments, counts, removes)  \
    type name parameters {                                        \
        JUDGE(counts, removes)                                    \
        return REAL(name) arguments;                              \
    }
CALL(int, fsync, (int file), (file), fd_counts(file), 0)
CALL(int, ftruncate, (int file, off_t size), (file, size), fd_counts(file), 0)
CALL(int, ftruncate64, (int file, off64_t size), (file, size), fd_counts(file), 0)
CALL(int, rename, (const char *from, const char *to), (from, to), path_counts(AT_FDCWD, to), 0)
CALL(int, renameat, (int f, const char *from, int t, const char *to), (f, from, t, to), path_counts(t, to), 0)
CALL(int, link, (const char *from, const char *to), (from, to), path_counts(AT_FDCWD, to), 0)
CALL(int, linkat, (int f, const char *from, int t, const char *to, int flags), (f, from, t, to, flags), path_counts(t, to), 0)
CALL(int, mkdir, (const char *path, mode_t mode), (path, mode), path_counts(AT_FDCWD, path), 0)
CALL(int, rmdir, (const char *path), (path), path_counts(AT_FDCWD, path), 1)
CALL(int, unlink, (const char *path), (path), path_counts(AT_FDCWD, path), 1)
CALL(int, unlinkat, (int folder, const char *path, int flags), (folder, path, flags), path_counts(folder, path), 1)

int renameat2(int f, const char *from, int t, const char *to, unsigned flags) {
    if (plan && plan->no_renameat2 && flags) {
        errno = EINVAL;
        return -1;
    }
    JUDGE(path_counts(t, to), 0)
    return REAL(renameat2)(f, from, t, to, flags);
}

// these two return the error instead of setting errno
#define FALLOCATE(name, off)                                      \
    int name(int file, off at, off size) {                        \
        if (fd_counts(file)) {                                    \
            int what = judge(0);                                 \
            if (what == 2) raise(SIGKILL);                        \
            if (what == 1) return errno;                          \
        }                                                         \
        return REAL(name)(file, at, size);                        \
    }
FALLOCATE(posix_fallocate, off_t)
FALLOCATE(posix_fallocate64, off64_t)
