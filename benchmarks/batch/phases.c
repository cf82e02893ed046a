/* A batch job of known phases: each round every thread does a fixed amount of work, then all sleep.
 *
 *   phases KIND THREADS ROUNDS STEPS IDLE_MS      KIND: cpu, memory (triad of 3 x 32 MiB), io (writes and fsync)
 *   phases KIND calibrate                         prints how many steps one thread does in 100 ms
 *
 * Prints one JSON object: when it began and ended, CPU time of its own, busy time of the machine, and per round
 * and thread when it was to wake, when it did, when its work was done, and the gaps of its first half second:
 * from when until when it did not run (ns of CLOCK_MONOTONIC). The work of a round is fixed, so its length tells
 * how much the job was slowed down; the gaps tell when it ran at full speed.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

enum { THREADS_MAX = 64, ROUNDS_MAX = 256, GAPS_MAX = 128, DOUBLES = 4 << 20, SLICE = 1 << 14, BLOCK = 1 << 18 };
enum { GAP_NS = 100000, WATCHED_NS = 500000000 };

typedef struct { int64_t due, woken, done, gaps[GAPS_MAX][2]; int gap_count; } Round;
typedef struct { int number; double *a, *b, *c; size_t at; int file; uint64_t state; } Worker;

static char kind;
static int threads, rounds;
static int64_t steps, idle_ns;
static Round table[THREADS_MAX][ROUNDS_MAX];
static pthread_barrier_t barrier;
static volatile int64_t due;

static int64_t now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void prepare(Worker *w) {
  w->state = 88172645463325252ULL + w->number;
  w->file = -1;
  if (kind == 'm') {
    double **all[] = {&w->a, &w->b, &w->c};
    for (int i = 0; i < 3; i++) {
      *all[i] = malloc(DOUBLES * sizeof(double));
      memset(*all[i], 1, DOUBLES * sizeof(double));
    }
  }
  if (kind == 'i') {
    char path[] = "phases-XXXXXX";
    w->file = mkstemp(path);
    unlink(path);
  }
}

/* About 10 us of work, or a block to the disk after as much work as 200 such. */
static void step(Worker *w, int64_t n) {
  if (kind == 'm') {
    for (size_t i = 0; i < SLICE; i++) w->a[w->at + i] = w->b[w->at + i] + 3.0 * w->c[w->at + i];
    w->at = (w->at + SLICE) % DOUBLES;
    return;
  }
  uint64_t x = w->state;
  for (int i = 0; i < 8000; i++) { x ^= x << 13; x ^= x >> 7; x ^= x << 17; }
  w->state = x;
  if (kind == 'i' && n % 200 == 199) {
    static char block[BLOCK];
    if (pwrite(w->file, block, BLOCK, 0) != BLOCK || fsync(w->file)) exit(1);
  }
}

/* A step of the kind `cpu` takes 10 us: one that takes ten times as long was interrupted. */
static void work_and_watch(Worker *w, Round *mine) {
  int64_t n = 0, before = mine->woken, end = before + WATCHED_NS, after;
  for (; n < steps && before < end; n++, before = after) {
    step(w, n);
    after = now();
    if (after - before < GAP_NS || mine->gap_count == GAPS_MAX) continue;
    mine->gaps[mine->gap_count][0] = before;
    mine->gaps[mine->gap_count++][1] = after;
  }
  for (; n < steps; n++) step(w, n);
}

static void *work(void *argument) {
  Worker *w = argument;
  prepare(w);
  for (int r = 0; r < rounds; r++) {
    Round *mine = &table[w->number][r];
    pthread_barrier_wait(&barrier);
    if (w->number == 0) due = now() + idle_ns;
    pthread_barrier_wait(&barrier);
    mine->due = due;
    if (idle_ns) {
      struct timespec until = {mine->due / 1000000000LL, mine->due % 1000000000LL};
      clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
    }
    mine->woken = now();
    work_and_watch(w, mine);
    mine->done = now();
  }
  return NULL;
}

static long long machine_busy_ticks(void) {
  long long user = 0, nice = 0, system = 0, idle, wait, irq = 0, soft = 0;
  FILE *file = fopen("/proc/stat", "r");
  if (!file || fscanf(file, "cpu %lld %lld %lld %lld %lld %lld %lld", &user, &nice, &system, &idle, &wait, &irq, &soft) != 7) exit(1);
  fclose(file);
  return user + nice + system + irq + soft;
}

static int calibrate(void) {
  Worker w = {0};
  prepare(&w);
  int64_t until = now() + 100000000LL, n = 0;
  for (; now() < until; n++) step(&w, n);
  printf("%lld\n", (long long)n);
  return 0;
}

static void print_round(const Round *r, const char *comma) {
  printf("%s[%lld, %lld, %lld, [", comma, (long long)r->due, (long long)r->woken, (long long)r->done);
  for (int g = 0; g < (kind == 'c' ? r->gap_count : 0); g++)
    printf("%s[%lld, %lld]", g ? ", " : "", (long long)r->gaps[g][0], (long long)r->gaps[g][1]);
  printf("]]");
}

int main(int count, char **words) {
  if (count < 3) return 2;
  kind = words[1][0];
  if (!strcmp(words[2], "calibrate")) return calibrate();
  if (count < 6) return 2;
  threads = atoi(words[2]), rounds = atoi(words[3]), steps = atoll(words[4]), idle_ns = atoll(words[5]) * 1000000LL;
  if (threads > THREADS_MAX || rounds > ROUNDS_MAX) return 2;
  Worker workers[THREADS_MAX] = {0};
  pthread_t ids[THREADS_MAX];
  pthread_barrier_init(&barrier, NULL, threads);
  int64_t begin = now();
  long long busy = machine_busy_ticks();
  for (int t = 0; t < threads; t++) workers[t].number = t, pthread_create(&ids[t], NULL, work, &workers[t]);
  for (int t = 0; t < threads; t++) pthread_join(ids[t], NULL);
  busy = machine_busy_ticks() - busy;
  int64_t end = now();
  struct rusage use;
  getrusage(RUSAGE_SELF, &use);
  double cpu_s = use.ru_utime.tv_sec + use.ru_stime.tv_sec + 1e-6 * (use.ru_utime.tv_usec + use.ru_stime.tv_usec);
  printf("{\"begin_ns\": %lld, \"end_ns\": %lld, \"cpu_s\": %.3f, \"machine_busy_s\": %.2f, \"rounds\": [", (long long)begin,
         (long long)end, cpu_s, (double)busy / sysconf(_SC_CLK_TCK));
  for (int t = 0; t < threads; t++)
    for (int r = 0; r < rounds; r++) print_round(&table[t][r], t || r ? ", " : "");
  puts("]}");
  return 0;
}
