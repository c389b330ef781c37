/* A load generator that checks every byte of every response.
 *
 *     load [-fh] [-c CONNECTIONS] [-s SECONDS] [-o OPENING] [-k KINDS] [-n EVENTS] [-t TAIL] PORT REQUESTS ANSWER
 *
 * One thread. REQUESTS is a file of KINDS (1) complete requests of equal length, sent in turn; with -f, each
 * connection always sends the same one. The body of every response must be the file ANSWER or, with -n, that file
 * EVENTS times, then `data: [DONE]` and TAIL newlines (2). CONNECTIONS (1) are reused for SECONDS, or until stdin ends
 * if that is 0; then running responses are awaited. A server may close a connection only after a response with
 * `connection: close`. At the start, at most OPENING connections wait for their first byte at once (all).
 *
 * With -h, streams are held: prints a line when all of them have received their first event, and another for each line
 * on stdin until its end. Otherwise prints one line at the end. Lines are JSON; times are in ms, `cpu` is in seconds.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include "chunks.h"
#include "wire.h"

#define HEAD_LIMIT 16384
#define MOST_ERRORS 1000
#define PATIENCE 60 /* seconds within which a byte must arrive, unless streams are held */

enum reading { HEAD, LENGTH, CHUNKED };

struct connection {
    int fd;
    enum reading reading;
    struct text unsent;
    bool waits_for_room;
    char head[HEAD_LIMIT];
    size_t head_size;
    size_t left; /* bytes still to come of a body of known length */
    struct chunks chunks;
    bool closes;
    bool busy; /* a request is sent and its response is not complete */
    size_t taken; /* bytes of the body that matched */
    double begun, first;
};

struct times {
    float *all;
    size_t count, room;
};

static int connections = 1, opening, kinds = 1, port, poll_fd;
static double run_for;
static bool hold, faithful;
static struct connection *all;
static struct text requests;
/* The body to expect: `unit` times `repeat`, then `tail`. */
static struct text unit, tail = TEXT("");
static size_t repeat = 1, expected;

static long sent, answers, errors, opened, waiting, running, dialled;
static size_t body_bytes;
static char first_error[512];
static struct times first_byte, whole;
static double started, last_byte;
static bool over;

/* -- figures --------------------------------------------------------------------------------------------------- */

static void add(struct times *t, double since, double until)
{
    if (t->count == t->room) {
        t->room = t->room ? 2 * t->room : 65536;
        if (!(t->all = realloc(t->all, t->room * sizeof *t->all))) err(1, "realloc");
    }
    t->all[t->count++] = (float)(1000 * (until - since));
}

static int ascending(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static double percentile(struct times *t, double share)
{
    if (!t->count) return 0;
    qsort(t->all, t->count, sizeof *t->all, ascending);
    return t->all[(size_t)(share * (double)(t->count - 1))];
}

static void report(void)
{
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    double cpu = (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
                 (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
    printf("{\"answers\": %ld, \"errors\": %ld, \"first_error\": \"%s\", \"bytes\": %zu, \"connections\": %ld, "
           "\"seconds\": %.6f, \"cpu\": %.6f, "
           "\"first_p50\": %.3f, \"first_p99\": %.3f, \"whole_p50\": %.3f, \"whole_p99\": %.3f}\n",
           answers, errors, first_error, body_bytes, dialled, seconds() - started, cpu,
           percentile(&first_byte, .5), percentile(&first_byte, .99), percentile(&whole, .5), percentile(&whole, .99));
    fflush(stdout);
}

/* -- one connection -------------------------------------------------------------------------------------------- */

static void wait_for_room(struct connection *c, bool room)
{
    if (c->waits_for_room == room) return;
    struct epoll_event e = {.events = EPOLLIN | (room ? (uint32_t)EPOLLOUT : 0), .data.ptr = c};
    if (epoll_ctl(poll_fd, EPOLL_CTL_MOD, c->fd, &e)) err(1, "epoll_ctl");
    c->waits_for_room = room;
}

/* Returns NULL or a description of the error. */
static const char *send_rest(struct connection *c)
{
    while (c->unsent.size) {
        ssize_t n = send(c->fd, c->unsent.bytes, c->unsent.size, MSG_NOSIGNAL);
        if (n < 0 && (errno == EAGAIN || errno == ENOTCONN)) break;
        if (n < 0) return strerrordesc_np(errno);
        c->unsent.bytes += n;
        c->unsent.size -= (size_t)n;
    }
    wait_for_room(c, c->unsent.size != 0);
    return NULL;
}

static void begin(struct connection *c)
{
    size_t size = requests.size / (size_t)kinds;
    long kind = faithful ? (c - all) * kinds / connections : sent % kinds;
    c->unsent = (struct text){requests.bytes + size * (size_t)kind, size};
    sent++;
    c->reading = HEAD;
    c->head_size = c->taken = 0;
    c->closes = false;
    c->busy = true;
    c->begun = seconds();
    c->first = 0;
    running++;
}

/* The connection is established later; an error shows at the first write. */
static void dial(struct connection *c)
{
    int on = 1;
    struct sockaddr_in address = {
        .sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    if ((c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0)) < 0) err(1, "socket");
    if (setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on)) err(1, "TCP_NODELAY");
    if (connect(c->fd, (struct sockaddr *)&address, sizeof address) && errno != EINPROGRESS) err(1, "connect");
    struct epoll_event e = {.events = EPOLLIN | EPOLLOUT, .data.ptr = c};
    if (epoll_ctl(poll_fd, EPOLL_CTL_ADD, c->fd, &e)) err(1, "epoll_ctl");
    c->waits_for_room = true;
    dialled++;
}

static void fail(struct connection *c, const char *what)
{
    if (!errors++) {
        snprintf(first_error, sizeof first_error, "%s, after %zu bytes of the body; head: %.*s", what, c->taken,
                 (int)(c->head_size < 160 ? c->head_size : 160), c->head);
        for (char *p = first_error; *p; p++)
            if (*p < ' ' || *p == '"' || *p == '\\') *p = ' ';
    }
    if (!c->first) waiting--;
    running--;
    close(c->fd);
    if (over || hold) return;
    dial(c);
    begin(c);
    waiting++;
}

/* -- one answer ------------------------------------------------------------------------------------------------ */

static const char *read_head(struct connection *c)
{
    c->head[c->head_size] = 0;
    if (strncmp(c->head, "HTTP/1.1 200 ", 13)) return "the status is not 200";
    const char *length = strcasestr(c->head, "\r\ncontent-length:");
    bool chunked = strcasestr(c->head, "\r\ntransfer-encoding: chunked");
    if (chunked == (length != NULL)) return "it has no length, or two";
    c->closes = strcasestr(c->head, "\r\nconnection: close");
    c->reading = chunked ? CHUNKED : LENGTH;
    c->chunks = (struct chunks){0};
    c->left = length ? strtoul(length + 17, NULL, 10) : 0;
    return length && c->left != expected ? "it has another length" : NULL;
}

static bool as_expected(struct connection *c, const char *bytes, size_t count)
{
    if (count && !c->first) {
        c->first = seconds();
        add(&first_byte, c->begun, c->first);
        waiting--;
    }
    body_bytes += count;
    if (c->taken + count > expected) return false;
    while (count) {
        bool in_tail = c->taken >= unit.size * repeat;
        size_t at = in_tail ? c->taken - unit.size * repeat : c->taken % unit.size;
        const struct text *part = in_tail ? &tail : &unit;
        size_t size = part->size - at < count ? part->size - at : count;
        if (memcmp(part->bytes + at, bytes, size)) return false;
        bytes += size;
        count -= size;
        c->taken += size;
    }
    return true;
}

static const char *answered(struct connection *c)
{
    if (c->taken != expected) return "the body is too short";
    if (hold) return "a stream that should last has ended";
    answers++;
    add(&whole, c->begun, seconds());
    running--;
    c->busy = false;
    if (over || c->closes) close(c->fd);
    if (over) return NULL;
    if (c->closes) dial(c);
    begin(c);
    waiting++;
    return c->waits_for_room ? NULL : send_rest(c);
}

/* Take received bytes. Returns NULL or a description of the error. */
static const char *take(struct connection *c, const char *bytes, size_t count)
{
    const char *wrong = NULL;
    bool complete = false;
    while (count && !wrong) {
        size_t taken = 1;
        if (complete || c->unsent.size) return "it came before a request was sent, or after its answer";
        if (c->reading == HEAD) {
            c->head[c->head_size++] = *bytes;
            if (c->head_size == HEAD_LIMIT) return "its head is too long";
            if (c->head_size >= 4 && !memcmp(c->head + c->head_size - 4, "\r\n\r\n", 4)) wrong = read_head(c);
        } else if (c->reading == LENGTH) {
            taken = count < c->left ? count : c->left;
            c->left -= taken;
            if (!as_expected(c, bytes, taken)) return "the body is another";
            complete = !c->left;
        } else {
            const char *data;
            size_t size;
            taken = chunks_take(&c->chunks, bytes, count, &data, &size);
            if (size && !as_expected(c, data, size)) return "the body is another";
            if (c->chunks.at == CHUNK_BAD) return "its chunks are broken";
            complete = c->chunks.at == CHUNK_END;
        }
        bytes += taken;
        count -= taken;
    }
    return complete && !wrong ? answered(c) : wrong;
}

static const char *handle(struct connection *c, uint32_t what)
{
    static char buffer[256 * 1024];
    const char *wrong;
    if (what & EPOLLOUT && (wrong = send_rest(c))) return wrong;
    if (!(what & ~(uint32_t)EPOLLOUT)) return NULL;
    ssize_t n = recv(c->fd, buffer, sizeof buffer, 0);
    if (n < 0) return errno == EAGAIN ? NULL : strerrordesc_np(errno);
    if (!n) return "the server has closed the connection";
    last_byte = seconds();
    return take(c, buffer, (size_t)n);
}

/* -- the run --------------------------------------------------------------------------------------------------- */

/* Read stdin. Each line requests a report; false at its end. */
static bool read_stdin(void)
{
    char line[256];
    ssize_t n = read(STDIN_FILENO, line, sizeof line);
    for (ssize_t i = 0; i < n; i++)
        if (line[i] == '\n') report();
    return n > 0;
}

static void run(void)
{
    struct epoll_event ready[512];
    bool said = false;
    started = last_byte = seconds();
    while (errors < MOST_ERRORS && !(over && !running)) {
        while (opened < connections && waiting < opening && !over) {
            dial(&all[opened]);
            begin(&all[opened++]);
            waiting++;
        }
        if (hold && !said && opened == connections && !waiting) {
            report();
            said = true;
        }
        int n = stay_awake(poll_fd, ready, 512, 100);
        if (n < 0 && errno != EINTR) err(1, "epoll_wait");
        for (int i = 0; i < n; i++) {
            struct connection *c = ready[i].data.ptr;
            if (!c) {
                if (!read_stdin()) over = true;
                continue;
            }
            const char *wrong = handle(c, ready[i].events);
            if (wrong) fail(c, wrong);
        }
        double now = seconds();
        if (run_for > 0 && now - started > run_for) over = true;
        if (hold && over) return;
        if (!hold && now - last_byte > PATIENCE) {
            errors++;
            snprintf(first_error, sizeof first_error, "nothing came for %d s", PATIENCE);
            return;
        }
    }
}

int main(int count, char **arguments)
{
    int option, events = 0, newlines = 2;
    while ((option = getopt(count, arguments, "fhc:s:o:k:n:t:")) != -1) {
        switch (option) {
        case 'f': faithful = true; break;
        case 'h': hold = true; break;
        case 'c': connections = atoi(optarg); break;
        case 's': run_for = atof(optarg); break;
        case 'o': opening = atoi(optarg); break;
        case 'k': kinds = atoi(optarg); break;
        case 'n': events = atoi(optarg); break;
        case 't': newlines = atoi(optarg); break;
        default: return 2;
        }
    }
    if (count - optind != 3) errx(2, "usage: load [options] PORT REQUESTS ANSWER");
    port = atoi(arguments[optind]);
    requests = read_file(arguments[optind + 1]);
    unit = read_file(arguments[optind + 2]);
    if (!unit.size || kinds < 1 || requests.size % (size_t)kinds) errx(2, "nothing to expect, or requests of no length");
    if (!opening) opening = connections;
    if (events) {
        repeat = (size_t)events;
        tail = (struct text){"data: [DONE]\n\n", 12 + (size_t)newlines};
    }
    expected = unit.size * repeat + tail.size;
    all = calloc((size_t)connections, sizeof *all);
    poll_fd = epoll_create1(0);
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = NULL};
    if (!all || poll_fd < 0) err(1, "epoll_create1");
    if ((hold || !(run_for > 0)) && epoll_ctl(poll_fd, EPOLL_CTL_ADD, STDIN_FILENO, &e)) err(1, "stdin");
    run();
    if (!hold) report();
    return 0;
}
