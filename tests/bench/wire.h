/* What both programs need of files and sockets. */
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

/* Of a clock that only runs forward. */
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

/* As epoll_wait, but without sleeping: a process that sleeps must be woken by whoever writes to it, and in a virtual
 * machine that costs the writer, the gateway that is measured, up to 10 us a time. Where clients and Azure are on other
 * machines it costs nothing. What else must run on this core (the TLS front) goes first. */
static inline int stay_awake(int fd, struct epoll_event *ready, int most, int milliseconds)
{
    static bool polite;
    if (!polite) polite = nice(19) != -2; /* of no importance where it fails */
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
