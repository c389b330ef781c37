/* Files and sockets, for both programs. */
#pragma once
#include <err.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct text {
    const char *bytes;
    size_t size;
};

#define TEXT(literal) ((struct text){literal, sizeof literal - 1})

static inline struct text read_file(const char *name)
{
    FILE *f = fopen(name, "rb");
    if (!f) err(1, "%s", name);
    char *bytes = NULL;
    size_t size = 0, more;
    do {
        if (!(bytes = realloc(bytes, size + 65536))) err(1, "realloc");
        more = fread(bytes + size, 1, 65536, f);
        size += more;
    } while (more);
    if (ferror(f)) err(1, "%s", name);
    fclose(f);
    return (struct text){bytes, size};
}

/* Seconds of a monotonic clock. */
static inline double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

#include <sched.h>
#include <stdbool.h>
#include <sys/epoll.h>
#include <unistd.h>

/* As epoll_wait, but without sleeping: a writer must wake a sleeping process, and in a virtual machine that costs the
 * writer, the measured gateway, up to 10 us each time. It costs nothing if clients and Azure are on other machines.
 * Other programs on this core (the TLS front) have priority. */
static inline int stay_awake(int fd, struct epoll_event *ready, int most, int milliseconds)
{
    static bool polite;
    if (!polite) polite = nice(19) != -2; /* a failure does not matter */
    struct timespec now, since;
    clock_gettime(CLOCK_MONOTONIC, &since);
    for (;;) {
        int n = epoll_wait(fd, ready, most, 0);
        if (n || !milliseconds) return n;
        clock_gettime(CLOCK_MONOTONIC, &now);
        long passed = (now.tv_sec - since.tv_sec) * 1000 + (now.tv_nsec - since.tv_nsec) / 1000000;
        if (milliseconds > 0 && passed >= milliseconds) return 0;
        sched_yield();
    }
}
