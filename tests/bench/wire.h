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
