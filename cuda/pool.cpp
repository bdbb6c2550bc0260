// What all kernels of the CPU share, compiled once: a small pool of threads, one per process, and calls of kernels
// whose arguments are settled but for the addresses.
//
// The caller works too, so a pool of n threads has n - 1 workers. A second caller who finds the pool busy does its work
// alone. After fork() the child starts without workers and makes its own when it needs them.
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

typedef void (*Task)(void *argument, int i);

namespace {

struct Pool {
  pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
  pthread_cond_t work = PTHREAD_COND_INITIALIZER, finished = PTHREAD_COND_INITIALIZER;
  Task task = nullptr;
  void *argument = nullptr;
  int tasks = 0, next = 0, unfinished = 0, workers = 0;
};

// Never destroyed: workers may outlive the end of main(). After fork() the child takes a fresh one, because the old
// one's condition variables still count workers that are gone.
Pool *pool = new Pool;

// The entry points of an OpenMP runtime (GCC's, or LLVM's, which has them, too).
struct OpenMP {
  void (*parallel)(void (*body)(void *), void *argument, unsigned threads, unsigned flags);
  int (*thread)(), (*threads)();
} openmp;

struct Job {
  Task task;
  void *argument;
  int tasks;
};

// What each thread of a team does; the team may be smaller than was asked for.
void share_of_job(void *given) {
  const Job *const job = static_cast<Job *>(given);
  const int step = openmp.threads();
  for (int i = openmp.thread(); i < job->tasks; i += step) job->task(job->argument, i);
}

// Takes tasks until none is left. The lock is held on entry and on return.
void work_off(Pool *p) {
  while (p->next < p->tasks) {
    const int i = p->next++;
    const Task task = p->task;
    void *const argument = p->argument;
    pthread_mutex_unlock(&p->lock);
    task(argument, i);
    pthread_mutex_lock(&p->lock);
    if (--p->unfinished == 0) pthread_cond_broadcast(&p->finished);
  }
}

void *worker(void *self) {
  Pool *const p = static_cast<Pool *>(self);
  pthread_mutex_lock(&p->lock);
  for (;;) {
    work_off(p);
    pthread_cond_wait(&p->work, &p->lock);
  }
  return nullptr;
}

// With the lock held. Fewer workers than wanted is no error: the caller does what they do not.
void have_workers(Pool *p, int wanted) {
  pthread_attr_t attributes;
  if (p->workers >= wanted || pthread_attr_init(&attributes) != 0) return;
  pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
  pthread_t thread;
  while (p->workers < wanted && pthread_create(&thread, &attributes, worker, p) == 0) p->workers++;
  pthread_attr_destroy(&attributes);
}

void before_fork() { pthread_mutex_lock(&pool->lock); }
void after_fork_in_parent() { pthread_mutex_unlock(&pool->lock); }
void after_fork_in_child() {
  pool = new Pool;
  openmp.parallel = nullptr;  // whose threads are gone, too, but it would wait for them
}

struct ForkHandlers {
  ForkHandlers() { pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child); }
} fork_handlers;

}  // namespace

// Runs task(argument, i) once for every i in [0, n), on up to n threads, and returns when all are done.
extern "C" __attribute__((visibility("default"))) void parallel_for(Task task, void *argument, int n) {
  Pool *const p = pool;
  pthread_mutex_lock(&p->lock);
  if (p->unfinished > 0) {
    pthread_mutex_unlock(&p->lock);
    for (int i = 0; i < n; i++) task(argument, i);
    return;
  }
  have_workers(p, n - 1);
  p->task = task;
  p->argument = argument;
  p->tasks = p->unfinished = n;
  p->next = 0;
  pthread_cond_broadcast(&p->work);
  work_off(p);
  while (p->unfinished > 0) pthread_cond_wait(&p->finished, &p->lock);
  pthread_mutex_unlock(&p->lock);
}

// The OpenMP runtime of a framework, for parallel_for_openmp.
extern "C" __attribute__((visibility("default"))) void use_openmp(void *parallel, void *thread, void *threads) {
  openmp.thread = reinterpret_cast<int (*)()>(thread);
  openmp.threads = reinterpret_cast<int (*)()>(threads);
  openmp.parallel = reinterpret_cast<void (*)(void (*)(void *), void *, unsigned, unsigned)>(parallel);
}

// As parallel_for, on the threads of the runtime that use_openmp was given. After a product these are awake, and wait
// for work for a while without sleeping: other threads would have to share the cores with them.
extern "C" __attribute__((visibility("default"))) void parallel_for_openmp(Task task, void *argument, int n) {
  if (!openmp.parallel) return parallel_for(task, argument, n);
  Job job = {task, argument, n};
  openmp.parallel(share_of_job, &job, n, 0);
}

// A kernel and its arguments: each takes eight bytes, `rest`, to which the address (or constant, with `rest` 0) number
// `number` is added if that is not negative.
struct Field {
  int64_t number, rest;
};
struct Prepared {
  void (*kernel)(const void *arguments, void *parallel_for, int tasks);
  void *parallel_for;
  int64_t tasks, n_fields;
  Field fields[];
};

extern "C" __attribute__((visibility("default"))) void run_prepared(const Prepared *p, const int64_t *addresses) {
  int64_t *const arguments = static_cast<int64_t *>(__builtin_alloca(p->n_fields * sizeof(int64_t)));
  for (int64_t i = 0; i < p->n_fields; i++) {
    const Field f = p->fields[i];
    arguments[i] = f.rest + (f.number < 0 ? 0 : addresses[f.number]);
  }
  p->kernel(arguments, p->parallel_for, static_cast<int>(p->tasks));
}
