/* How long the library takes to be opened and to make a runtime when none of its file is in memory, ms; fails if the median
 * of some runs is above a bound. Each run is a process of its own. Usage: open LIBRARY BOUND-MS */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { RUNS = 9 };

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

static double open_cold(const char *path) {
    int fd = open(path, O_RDONLY);
    if (fd < 0 || fsync(fd) != 0 || posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED) != 0) return -1;
    close(fd);
    double began = now();
    void *library = dlopen(path, RTLD_NOW), *runtime;
    int (*create)(void **) = NULL;
    if (library) *(void **)&create = dlsym(library, "kinglet_runtime_create");
    return create && create(&runtime) == 0 ? now() - began : -1;
}

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv) {
    double took[RUNS];
    if (argc != 3) return 2;
    for (int i = 0; i < RUNS; i++) {
        int ends[2], status;
        if (pipe(ends) != 0) return 2;
        pid_t child = fork();
        if (child == 0) {
            double ms = open_cold(argv[1]);
            _exit(write(ends[1], &ms, sizeof ms) != sizeof ms);
        }
        if (child < 0 || read(ends[0], &took[i], sizeof took[i]) != sizeof took[i] || waitpid(child, &status, 0) != child ||
            took[i] < 0)
            return 2;
        close(ends[0]), close(ends[1]);
    }
    qsort(took, RUNS, sizeof *took, by_size);
    printf("open and create, from the drive: median %.1f ms, most %.1f ms\n", took[RUNS / 2], took[RUNS - 1]);
    return took[RUNS / 2] > atof(argv[2]);
}
