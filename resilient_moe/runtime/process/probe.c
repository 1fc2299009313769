/* Probes between processes that no interpreter can delay.
 *
 * A probe asks "does this process still run?". Asked, answered or timed by
 * Python, it would also ask "who holds the interpreter lock?", and a rank that
 * imports a module or serializes a program would look dead. So both ends are
 * threads that never enter the interpreter. ctypes calls the functions below
 * with the lock released.
 *
 * The answer comes from a thread of its own: it says that the process is
 * scheduled, not that its steps advance. That is the step watchdog's question.
 */
#define _POSIX_C_SOURCE 200809L
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { ASKED = 1, ANSWERED = 2 };
enum { MAX_SLOTS = 4096, BURST = 64, MAX_WAIT_MS = 50 };

/* What goes over the wire. The responder changes `kind` alone, so that two
 * responders can't answer each other for ever, and only the sender, which
 * shares its own byte order, reads the rest. */
struct probe {
  uint8_t kind;
  uint8_t unused[3];
  uint32_t slot;
  uint64_t number; /* counts all probes of one prober */
};

struct slot {
  int used;
  int waiting; /* the newest probe has not been answered */
  long missed; /* probes in a row that were unanswered when the next was due */
  double heard_s; /* the last answer, or when the slot was added */
  uint64_t first; /* answers to lower numbers are for a former user */
  struct sockaddr_in address;
};

struct prober {
  int fd;
  int stopped;
  int n_slots; /* those from here on were never used */
  double interval_s;
  double next_s; /* when the next round is due */
  uint64_t number;
  pthread_t thread;
  pthread_mutex_t mutex; /* for all but fd, thread and interval_s */
  struct slot slots[MAX_SLOTS];
};

static double now_s(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static double earlier(double a, double b) { return a < b ? a : b; }

/* A socket that processes started later don't inherit, or -1. */
static int udp_socket(void) {
  int fd = socket(AF_INET, SOCK_DGRAM, 0);
  if (fd >= 0) fcntl(fd, F_SETFD, FD_CLOEXEC);
  return fd;
}

/* Signals stay with the interpreter's threads: one that is handled here would
 * not wake the main thread, and Ctrl-C would wait for its next system call. */
static int start_thread(pthread_t *thread, void *(*body)(void *), void *given) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  int error = pthread_create(thread, NULL, body, given);
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  return error;
}

static int parse(const char *host, int port, struct sockaddr_in *address) {
  *address = (struct sockaddr_in){.sin_family = AF_INET,
                                  .sin_port = htons((uint16_t)port)};
  return inet_pton(AF_INET, host, &address->sin_addr) == 1 ? 0 : -EINVAL;
}

/* ---- the end that answers ---- */

static void *respond(void *given) {
  int fd = (int)(intptr_t)given;
  for (;;) {
    struct probe probe[2]; /* room to see that a datagram is too long */
    struct sockaddr_in sender;
    socklen_t length = sizeof sender;
    ssize_t size = recvfrom(fd, probe, sizeof probe, 0,
                            (struct sockaddr *)&sender, &length);
    if (size < 0 && errno == EBADF) return NULL; /* closed under us */
    if (size != sizeof *probe || probe->kind != ASKED) continue;
    probe->kind = ANSWERED;
    sendto(fd, probe, sizeof *probe, 0, (struct sockaddr *)&sender, length);
  }
}

/* Answers probes until the process ends. Returns 0 or -errno. */
int probe_responder_start(const char *host, int *port) {
  struct sockaddr_in address;
  socklen_t length = sizeof address;
  pthread_t thread;
  if (parse(host, 0, &address) < 0) return -EINVAL;
  int fd = udp_socket();
  if (fd < 0) return -errno;
  int error;
  if (bind(fd, (struct sockaddr *)&address, sizeof address) < 0 ||
      getsockname(fd, (struct sockaddr *)&address, &length) < 0)
    error = errno;
  else
    error = start_thread(&thread, respond, (void *)(intptr_t)fd);
  if (error) {
    close(fd);
    return -error;
  }
  pthread_detach(thread);
  *port = ntohs(address.sin_port);
  return 0;
}

/* ---- the end that asks ---- */

/* Reads every answer that has come. A late one counts as any other: whoever
 * sent it runs. */
static void hear(struct prober *p) {
  struct probe probe[2];
  ssize_t size;
  while ((size = recv(p->fd, probe, sizeof probe, MSG_DONTWAIT)) >= 0) {
    if (size != sizeof *probe || probe->kind != ANSWERED) continue;
    if (probe->slot >= MAX_SLOTS) continue;
    struct slot *slot = &p->slots[probe->slot];
    if (!slot->used || probe->number < slot->first) continue;
    slot->heard_s = now_s();
    slot->waiting = 0;
    slot->missed = 0;
  }
}

/* One round of probes. Whatever has come was read before, so a round that is
 * late has given the answers more time, not less. */
static void ask(struct prober *p, double now) {
  /* Time in which this thread did not run is nobody's silence. */
  double lost_s = now - (p->next_s + p->interval_s);
  for (int i = 0; i < p->n_slots; i++) {
    struct slot *slot = &p->slots[i];
    if (!slot->used) continue;
    if (lost_s > 0) slot->heard_s = earlier(now, slot->heard_s + lost_s);
    if (slot->waiting) slot->missed++;
    slot->waiting = 1;
    struct probe probe = {.kind = ASKED, .slot = i, .number = p->number++};
    /* One that can't be sent is not answered either: no need to look. */
    sendto(p->fd, &probe, sizeof probe, MSG_DONTWAIT,
           (struct sockaddr *)&slot->address, sizeof slot->address);
    if (i % BURST == BURST - 1) hear(p); /* or answers overflow the socket */
  }
  /* From here, not from the last due time: each probe gets a full interval. */
  p->next_s = now_s() + p->interval_s;
}

static void *watch(void *given) {
  struct prober *p = given;
  struct pollfd readable = {.fd = p->fd, .events = POLLIN};
  for (;;) {
    pthread_mutex_lock(&p->mutex);
    hear(p);
    double now = now_s();
    if (now >= p->next_s) ask(p, now);
    double wait_ms = 1e3 * (p->next_s - now_s());
    int stopped = p->stopped;
    pthread_mutex_unlock(&p->mutex);
    if (stopped) return NULL;
    /* Bounded, because `prober_stop` does not wake the thread. */
    if (wait_ms > MAX_WAIT_MS) wait_ms = MAX_WAIT_MS;
    poll(&readable, 1, wait_ms > 0 ? (int)wait_ms + 1 : 0);
  }
}

/* NULL with errno set where there is no memory, socket or thread. */
void *prober_start(double interval_s) {
  struct prober *p = calloc(1, sizeof *p);
  if (!p) return NULL;
  p->interval_s = interval_s;
  p->next_s = now_s();
  pthread_mutex_init(&p->mutex, NULL);
  p->fd = udp_socket();
  int error = p->fd < 0 ? errno : start_thread(&p->thread, watch, p);
  if (!error) return p;
  if (p->fd >= 0) close(p->fd);
  free(p);
  errno = error;
  return NULL;
}

/* The slot that stands for this address from now on, or -errno. */
int prober_add(void *given, const char *host, int port) {
  struct prober *p = given;
  struct sockaddr_in address;
  if (parse(host, port, &address) < 0) return -EINVAL;
  pthread_mutex_lock(&p->mutex);
  int i = 0;
  while (i < MAX_SLOTS && p->slots[i].used) i++;
  if (i < MAX_SLOTS) {
    p->slots[i] = (struct slot){
        .used = 1, .heard_s = now_s(), .first = p->number, .address = address};
    if (i >= p->n_slots) p->n_slots = i + 1;
  }
  pthread_mutex_unlock(&p->mutex);
  return i < MAX_SLOTS ? i : -ENOSPC;
}

void prober_remove(void *given, int slot) {
  struct prober *p = given;
  pthread_mutex_lock(&p->mutex);
  p->slots[slot].used = 0;
  pthread_mutex_unlock(&p->mutex);
}

/* Seconds since the last answer, or since the slot was added. They end one
 * interval after a round was due: if the thread has not run since, because
 * this very process was stopped, nobody was asked. */
double prober_silence(void *given, int slot) {
  struct prober *p = given;
  pthread_mutex_lock(&p->mutex);
  double end_s = earlier(now_s(), p->next_s + p->interval_s);
  double silence_s = end_s - p->slots[slot].heard_s;
  pthread_mutex_unlock(&p->mutex);
  return silence_s > 0 ? silence_s : 0;
}

/* Probes in a row that were unanswered when the next one was due. */
long prober_missed(void *given, int slot) {
  struct prober *p = given;
  pthread_mutex_lock(&p->mutex);
  long missed = p->slots[slot].missed;
  pthread_mutex_unlock(&p->mutex);
  return missed;
}

/* Ends the thread, within 50 ms, and frees everything. */
void prober_stop(void *given) {
  struct prober *p = given;
  pthread_mutex_lock(&p->mutex);
  p->stopped = 1;
  pthread_mutex_unlock(&p->mutex);
  pthread_join(p->thread, NULL);
  close(p->fd);
  pthread_mutex_destroy(&p->mutex);
  free(p);
}
