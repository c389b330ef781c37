/* Chunked transfer coding (RFC 9112, 7.1), taken apart as it arrives. */
#pragma once
#include <stdbool.h>
#include <stddef.h>

enum chunks_at { CHUNK_SIZE, CHUNK_EXTENSION, CHUNK_DATA, CHUNK_AFTER, CHUNK_TRAILER, CHUNK_END, CHUNK_BAD };

struct chunks {
    enum chunks_at at;
    size_t left;  /* of the chunk's data; while its size is read, what was read of it */
    int digits;   /* of the size */
    bool in_line; /* a trailer's line has begun */
};

static inline void chunks_size_over(struct chunks *c)
{
    c->at = !c->digits ? CHUNK_BAD : c->left ? CHUNK_DATA : CHUNK_TRAILER;
    c->in_line = false;
}

static inline int chunks_digit(char b)
{
    return b >= '0' && b <= '9' ? b - '0' : (b | 32) >= 'a' && (b | 32) <= 'f' ? (b | 32) - 'a' + 10 : -1;
}

/* Take bytes up to the end of the first piece of data among them, which is left in *data and *size (0: none).
   Returns how many were taken; go on until all are, or until it is at CHUNK_END or CHUNK_BAD. */
static inline size_t chunks_take(struct chunks *c, const char *bytes, size_t count, const char **data, size_t *size)
{
    size_t i = 0;
    *size = 0;
    while (i < count && c->at < CHUNK_END) {
        if (c->at == CHUNK_DATA) {
            *data = bytes + i;
            *size = count - i < c->left ? count - i : c->left;
            c->left -= *size;
            if (!c->left) c->at = CHUNK_AFTER;
            return i + *size;
        }
        char b = bytes[i++];
        switch (c->at) {
        case CHUNK_SIZE:
            if (chunks_digit(b) >= 0 && c->digits < 8) {
                c->left = c->left * 16 + (size_t)chunks_digit(b);
                c->digits++;
            } else if (b == '\n') chunks_size_over(c);
            else if (b == ';') c->at = CHUNK_EXTENSION;
            else if (b != '\r') c->at = CHUNK_BAD;
            break;
        case CHUNK_EXTENSION:
            if (b == '\n') chunks_size_over(c);
            break;
        case CHUNK_AFTER:
            if (b == '\n') *c = (struct chunks){0};
            else if (b != '\r') c->at = CHUNK_BAD;
            break;
        default: /* CHUNK_TRAILER */
            if (b == '\n' && !c->in_line) c->at = CHUNK_END;
            else if (b == '\n') c->in_line = false;
            else if (b != '\r') c->in_line = true;
        }
    }
    return i;
}
