/* A fake Azure OpenAI, fast enough never to be the bottleneck.
 *
 *     azure ANSWER EVENT
 *
 * One thread; listens on a free port of 127.0.0.1 and prints it. Files: the body of a plain response, and one
 * event of a stream. Every POST must be the classic chat operation with the api-version below (else 404), with an
 * api-key and no authorization (else 401); its body is read and discarded. The response to later requests:
 *
 *     GET /control?answer=json                          the plain response
 *     GET /control?answer=stream&events=200&every=20    a stream: the first event at once, then one each 20 ms (0: as
 *                                                       fast as the socket accepts them), then `data: [DONE]` and *one*
 *                                                       newline, as Azure has ended streams
 *     GET /control?answer=hold                          a stream of one event, then silence
 *
 * A GET is answered with the number of requests and of bytes of their bodies, as JSON.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "chunks.h"
#include "wire.h"

#define REQUEST "POST /openai/deployments/"
#define OPERATION "/chat/completions?api-version=2024-10-21 HTTP/1.1"
#define FIELDS "x-ms-region: East US\r\nx-ratelimit-remaining-requests: 299\r\nx-ratelimit-remaining-tokens: 239984\r\n"
#define HEAD_LIMIT 16384
#define STREAMS 65536

enum answers { JSON, STREAM, HOLD };
enum reading { HEAD, LENGTH, CHUNKED };

struct connection {
    int fd;
    enum reading reading;
    char *head; /* of a request that arrives in pieces */
    size_t head_size;
    size_t body_left;
    struct chunks chunks;
    struct text refusal;  /* the response to send instead, after the body */
    struct text out;      /* bytes that the socket has not accepted yet */
    bool waits_for_room;
    bool answering;       /* a stream is running */
    int events, every;    /* still to come; milliseconds, 0 without a pace */
    int place;            /* in `streams`, or -1 */
};

/* Streams with more to send, and their times, in one array: it is scanned each millisecond. */
static struct {
    double due;
    struct connection *connection;
} streams[STREAMS];
static int stream_count;

static struct {
    enum answers answer;
    int events, every;
} control;

static unsigned long requests, body_bytes;
static struct text plain, stream_start, event, stream_end;
static int poll_fd;

/* -- streams --------------------------------------------------------------------------------------------------- */

static void add_stream(struct connection *c, double due)
{
    if (stream_count == STREAMS) errx(1, "more than %d streams", STREAMS);
    c->place = stream_count;
    streams[stream_count].due = due;
    streams[stream_count++].connection = c;
}

static void remove_stream(struct connection *c)
{
    if (c->place < 0) return;
    streams[c->place] = streams[--stream_count];
    streams[c->place].connection->place = c->place;
    c->place = -1;
}

/* -- sending --------------------------------------------------------------------------------------------------- */

static void wait_for_room(struct connection *c, bool room)
{
    if (c->waits_for_room == room) return;
    struct epoll_event e = {.events = EPOLLIN | (room ? (uint32_t)EPOLLOUT : 0), .data.ptr = c};
    if (epoll_ctl(poll_fd, EPOLL_CTL_MOD, c->fd, &e)) err(1, "epoll_ctl");
    c->waits_for_room = room;
}

/* Send; the rest goes out later. False: the connection is broken. */
static bool send_text(struct connection *c, struct text text)
{
    while (text.size) {
        ssize_t n = send(c->fd, text.bytes, text.size, MSG_NOSIGNAL);
        if (n < 0 && errno != EAGAIN) return false;
        if (n < 0) break;
        text.bytes += n;
        text.size -= (size_t)n;
    }
    c->out = text;
    wait_for_room(c, text.size != 0);
    return true;
}

static bool send_next(struct connection *c)
{
    if (c->events--) {
        streams[c->place].due += c->every / 1e3;
        return send_text(c, event);
    }
    remove_stream(c);
    c->answering = false;
    return send_text(c, stream_end);
}

static bool answer(struct connection *c)
{
    requests++;
    c->reading = HEAD;
    if (c->refusal.size) return send_text(c, c->refusal);
    if (control.answer == JSON) return send_text(c, plain);
    c->answering = true;
    c->events = control.events - 1;
    c->every = control.every;
    /* Streams of different clients are independent of each other, and so are their places in the interval. */
    if (control.answer == STREAM) add_stream(c, seconds() + c->every / 1e3 * drand48());
    return send_text(c, stream_start);
}

static bool answer_get(struct connection *c, const char *line)
{
    static char reply[256];
    if (sscanf(line, "GET /control?answer=stream&events=%d&every=%d", &control.events, &control.every) == 2)
        control.answer = STREAM;
    else if (strstr(line, "?answer=hold")) control.answer = HOLD;
    else if (strstr(line, "?answer=json")) control.answer = JSON;
    char body[128];
    int size = snprintf(body, sizeof body, "{\"requests\": %lu, \"body_bytes\": %lu}", requests, body_bytes);
    int n = snprintf(reply, sizeof reply, "HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s", size, body);
    return send_text(c, (struct text){reply, (size_t)n});
}

/* -- reading --------------------------------------------------------------------------------------------------- */

/* Read a complete head, and respond if there is no body. False: disconnect. */
static bool read_head(struct connection *c, const char *head, size_t size)
{
    const char *end = head + size - 2, *line_end = memchr(head, '\r', size);
    char line[1024];
    size_t length = (size_t)(line_end - head);
    if (length >= sizeof line) return false;
    memcpy(line, head, length);
    line[length] = 0;
    if (!strncmp(line, "GET ", 4)) return answer_get(c, line);

    bool chunked = false, key = false, authorization = false;
    c->body_left = 0;
    for (const char *p = line_end + 2; p < end; p = (const char *)memchr(p, '\n', (size_t)(head + size - p)) + 1) {
        switch (*p | 32) { /* the first letter decides for nearly all of them */
        case 'a':
            key |= !strncasecmp(p, "api-key:", 8);
            authorization |= !strncasecmp(p, "authorization:", 14);
            break;
        case 'c':
            if (!strncasecmp(p, "content-length:", 15)) c->body_left = strtoul(p + 15, NULL, 10);
            break;
        case 't':
            chunked |= !strncasecmp(p, "transfer-encoding: chunked", 26);
            break;
        }
    }
    const char *operation = strncmp(line, REQUEST, sizeof REQUEST - 1) ? NULL : strchr(line + sizeof REQUEST - 1, '/');
    bool right = operation && !strcmp(operation, OPERATION);
    c->refusal = (struct text){0};
    if (!right) c->refusal = TEXT("HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n");
    else if (!key || authorization) c->refusal = TEXT("HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\n\r\n");
    if (!chunked && !c->body_left) return answer(c);
    c->reading = chunked ? CHUNKED : LENGTH;
    c->chunks = (struct chunks){0};
    return true;
}

/* Take part of a head; returns its size, 0: disconnect. */
static size_t take_head(struct connection *c, const char *bytes, size_t count)
{
    const char *end = c->head_size ? NULL : memmem(bytes, count, "\r\n\r\n", 4);
    if (end) { /* it came in one piece */
        size_t size = (size_t)(end - bytes) + 4;
        return read_head(c, bytes, size) ? size : 0;
    }
    if (!c->head && !(c->head = malloc(HEAD_LIMIT))) err(1, "malloc");
    if (c->head_size == HEAD_LIMIT) return 0;
    c->head[c->head_size++] = *bytes;
    if (c->head_size < 4 || memcmp(c->head + c->head_size - 4, "\r\n\r\n", 4)) return 1;
    size_t size = c->head_size;
    c->head_size = 0;
    return read_head(c, c->head, size) ? 1 : 0;
}

/* Take received bytes. False: disconnect. */
static bool take(struct connection *c, const char *bytes, size_t count)
{
    while (count) {
        if (c->answering || c->out.size) return false; /* no client sends a request before the last response is complete */
        size_t taken;
        if (c->reading == HEAD) {
            if (!(taken = take_head(c, bytes, count))) return false;
        } else if (c->reading == LENGTH) {
            taken = count < c->body_left ? count : c->body_left;
            c->body_left -= taken;
            body_bytes += taken;
            if (!c->body_left && !answer(c)) return false;
        } else {
            const char *data;
            size_t size;
            taken = chunks_take(&c->chunks, bytes, count, &data, &size);
            body_bytes += size;
            if (c->chunks.at == CHUNK_BAD || (c->chunks.at == CHUNK_END && !answer(c))) return false;
        }
        bytes += taken;
        count -= taken;
    }
    return true;
}

/* -- the loop -------------------------------------------------------------------------------------------------- */

static bool handle(struct connection *c, uint32_t what)
{
    static char buffer[256 * 1024];
    if (what & EPOLLOUT && !send_text(c, c->out)) return false;
    if (!(what & ~(uint32_t)EPOLLOUT)) return true;
    ssize_t n = recv(c->fd, buffer, sizeof buffer, 0);
    if (n <= 0) return n < 0 && errno == EAGAIN;
    return take(c, buffer, (size_t)n);
}

static void hang_up(struct connection *c)
{
    remove_stream(c);
    close(c->fd);
    free(c->head);
    free(c);
}

static void accept_all(int listener)
{
    int fd, on = 1;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
        struct connection *c = calloc(1, sizeof *c);
        if (!c) err(1, "calloc");
        c->fd = fd;
        c->place = -1;
        if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on)) err(1, "TCP_NODELAY");
        struct epoll_event e = {.events = EPOLLIN, .data.ptr = c};
        if (epoll_ctl(poll_fd, EPOLL_CTL_ADD, fd, &e)) err(1, "epoll_ctl");
    }
    if (errno != EAGAIN && errno != ECONNABORTED) err(1, "accept");
}

/* One event of each stream whose turn it is. Returns how long there is nothing to do, in milliseconds, or -1. */
static int send_what_is_due(void)
{
    static double looked;
    double now = seconds();
    bool unpaced = false;
    if (now - looked < 0.001 && stream_count && streams[0].connection->every) return 1;
    looked = now;
    for (int i = 0; i < stream_count;) {
        struct connection *c = streams[i].connection;
        if (streams[i].due <= now && !c->out.size) {
            if (!send_next(c)) hang_up(c);
            else unpaced |= c->place >= 0 && !c->every && !c->out.size;
        }
        if (i < stream_count && streams[i].connection == c) i++;
    }
    return unpaced ? 0 : stream_count ? 1 : -1;
}

int main(int count, char **arguments)
{
    if (count != 3) errx(2, "usage: azure ANSWER EVENT");
    struct text body = read_file(arguments[1]), one = read_file(arguments[2]);
    char *bytes;
    plain.size = (size_t)asprintf(&bytes, "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n" FIELDS
                                  "content-length: %zu\r\n\r\n%.*s", body.size, (int)body.size, body.bytes);
    plain.bytes = bytes;
    event.size = (size_t)asprintf(&bytes, "%zx\r\n%.*s\r\n", one.size, (int)one.size, one.bytes);
    event.bytes = bytes;
    stream_start.size = (size_t)asprintf(&bytes, "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n" FIELDS
                                         "transfer-encoding: chunked\r\n\r\n%.*s", (int)event.size, event.bytes);
    stream_start.bytes = bytes;
    stream_end = TEXT("d\r\ndata: [DONE]\n\r\n0\r\n\r\n");

    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    if (listener < 0 || bind(listener, (struct sockaddr *)&address, size) || listen(listener, 4096) ||
        getsockname(listener, (struct sockaddr *)&address, &size))
        err(1, "listen");
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);

    poll_fd = epoll_create1(0);
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = NULL}, ready[512];
    if (poll_fd < 0 || epoll_ctl(poll_fd, EPOLL_CTL_ADD, listener, &e)) err(1, "epoll");
    for (;;) {
        int n = stay_awake(poll_fd, ready, 512, send_what_is_due());
        if (n < 0 && errno != EINTR) err(1, "epoll_wait");
        for (int i = 0; i < n; i++) {
            if (!ready[i].data.ptr) accept_all(listener);
            else if (!handle(ready[i].data.ptr, ready[i].events)) hang_up(ready[i].data.ptr);
        }
    }
}
