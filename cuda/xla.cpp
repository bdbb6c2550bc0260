// What XLA calls on the CPU for one pass of a recurrence: a handler of its foreign function interface, for all cells.
//
// A text among the attributes states the pass. With the dtypes and sizes of the buffers it is the key of a plan, which
// Python makes where there is none yet: the kernel, and of which buffer each address among its arguments is. Plans are
// kept, so that most calls go without Python. Several threads of XLA's may call at once.
#include "xla_ffi.h"

#include <stdlib.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

using namespace xla_ffi;

namespace {

typedef void (*Kernel)(const void *arguments, void *parallel_for, int tasks);

// Eight bytes of a kernel's arguments: `rest`, to which the address of a buffer is added if `buffer` >= 0. Results are
// counted after the operands.
struct Field {
  int64_t buffer, rest;
};

const int F32 = 11, F64 = 12;   // of XLA's numbers of dtypes
const int64_t LARGE = 4 << 20;  // bytes from which on a result is worth the call
const int MAX_FIELDS = 1 << 13, MAX_MESSAGE = 1 << 13;

// What the planner fills in; kernel null: `message` says what is wrong.
struct Reply {
  Kernel kernel;
  void *pool;
  int64_t tasks, n_fields;
  Field fields[MAX_FIELDS];
  char message[MAX_MESSAGE];
};

typedef void (*Planner)(const Frame *, Reply *);

struct Plan {
  Plan *next;
  uint64_t hash;
  size_t key_bytes;
  int64_t *key;
  Kernel kernel;
  void *pool;
  int tasks;
  int64_t n_fields;
  Field *fields;
};

#ifndef SRU_MAX_PLANS  // that are kept; beyond them each call is planned anew
#define SRU_MAX_PLANS (1 << 14)
#endif

const int BUCKETS = 1 << 12;
Plan *plans[BUCKETS];  // lists that only grow, at their heads
int n_plans;
Planner planner;
int reported_minor;

const Text *stated(const Frame *frame) {
  const Attributes &a = frame->attributes;
  for (int64_t i = 0; i < a.size; i++)
    if (a.types[i] == STRING && a.names[i]->size == 4 && !memcmp(a.names[i]->begin, "call", 4))
      return (const Text *)a.values[i];
  return nullptr;
}

const Buffer *buffer_of(const Frame *frame, int64_t i) {
  const int64_t n = frame->operands.size;
  return i < n ? frame->operands.buffers[i] : frame->results.buffers[i - n];
}

size_t key_size(const Frame *frame, const Text *text) {
  size_t words = 3 + (text->size + 7) / 8;
  for (int64_t i = 0; i < frame->operands.size + frame->results.size; i++) words += 2 + buffer_of(frame, i)->rank;
  return words;
}

void make_key(const Frame *frame, const Text *text, int64_t *key) {
  *key++ = frame->operands.size;
  *key++ = frame->results.size;
  *key++ = text->size;
  const size_t words = (text->size + 7) / 8;
  if (words) key[words - 1] = 0;
  memcpy(key, text->begin, text->size);
  key += words;
  for (int64_t i = 0; i < frame->operands.size + frame->results.size; i++) {
    const Buffer *b = buffer_of(frame, i);
    *key++ = b->dtype;
    *key++ = b->rank;
    for (int64_t j = 0; j < b->rank; j++) *key++ = b->dims[j];
  }
}

uint64_t hash_of(const int64_t *key, size_t words) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (size_t i = 0; i < words; i++) {
    hash = (hash ^ (uint64_t)key[i]) * 0x9e3779b97f4a7c15u;
    hash ^= hash >> 29;
  }
  return hash;
}

const Plan *find(uint64_t hash, const int64_t *key, size_t bytes) {
  for (const Plan *p = __atomic_load_n(&plans[hash % BUCKETS], __ATOMIC_ACQUIRE); p; p = p->next)
    if (p->hash == hash && p->key_bytes == bytes && !memcmp(p->key, key, bytes)) return p;
  return nullptr;
}

// XLA maps memory anew for large results at each call, whose small pages cost several times what the kernel does.
void ask_for_large_pages(const Buffer *b) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  int64_t bytes = b->dtype == F64 ? 8 : b->dtype == F32 ? 4 : 2;
  for (int64_t j = 0; j < b->rank; j++) bytes *= b->dims[j];
  if (bytes < LARGE) return;
  const uintptr_t page = 1 << 12, first = ((uintptr_t)b->data + page - 1) & ~(page - 1);
  const uintptr_t end = ((uintptr_t)b->data + bytes) & ~(page - 1);
  madvise((void *)first, end - first, MADV_HUGEPAGE);  // where it cannot be, nothing changes
#else
  (void)b;
#endif
}

void run(const Frame *frame, Kernel kernel, void *pool, int tasks, const Field *fields, int64_t n) {
  int64_t *const arguments = (int64_t *)__builtin_alloca(n * sizeof(int64_t));
  for (int64_t i = 0; i < frame->results.size; i++) ask_for_large_pages(frame->results.buffers[i]);
  for (int64_t i = 0; i < n; i++) {
    const int64_t b = fields[i].buffer;
    arguments[i] = fields[i].rest + (b < 0 ? 0 : (int64_t)buffer_of(frame, b)->data);
  }
  kernel(arguments, pool, tasks);
}

// Two threads may keep plans for one key; the older one is then never found.
void keep(const Reply *reply, uint64_t hash, const int64_t *key, size_t bytes) {
  if (__atomic_fetch_add(&n_plans, 1, __ATOMIC_RELAXED) >= SRU_MAX_PLANS) {
    __atomic_fetch_sub(&n_plans, 1, __ATOMIC_RELAXED);
    return;
  }
  const size_t field_bytes = reply->n_fields * sizeof(Field);
  char *const memory = (char *)malloc(sizeof(Plan) + field_bytes + bytes);
  if (!memory) return;
  Plan *const p = (Plan *)memory;
  p->hash = hash;
  p->key_bytes = bytes;
  p->fields = (Field *)(memory + sizeof(Plan));
  p->key = (int64_t *)(memory + sizeof(Plan) + field_bytes);
  p->kernel = reply->kernel;
  p->pool = reply->pool;
  p->tasks = (int)reply->tasks;
  p->n_fields = reply->n_fields;
  memcpy(p->fields, reply->fields, field_bytes);
  memcpy(p->key, key, bytes);
  Plan **const head = &plans[hash % BUCKETS];
  p->next = __atomic_load_n(head, __ATOMIC_ACQUIRE);
  while (!__atomic_compare_exchange_n(head, &p->next, p, false, __ATOMIC_RELEASE, __ATOMIC_ACQUIRE)) {
  }
}

Error *plan_and_run(const Frame *frame, uint64_t hash, const int64_t *key, size_t bytes) {
  Reply *const reply = (Reply *)malloc(sizeof(Reply));
  if (!reply) return error(frame, INTERNAL, "sru_rt: out of memory");
  reply->kernel = nullptr;
  reply->message[0] = 0;
  planner(frame, reply);
  Error *failure = nullptr;
  if (reply->kernel) {
    keep(reply, hash, key, bytes);
    run(frame, reply->kernel, reply->pool, (int)reply->tasks, reply->fields, reply->n_fields);
  } else {
    failure = error(frame, INVALID_ARGUMENT, reply->message);
  }
  free(reply);
  return failure;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT Error *xla_handler(Frame *frame) {
  if (answers_metadata(frame, reported_minor) || frame->stage != EXECUTE) return nullptr;
  const Text *const text = stated(frame);
  if (!text) return error(frame, INVALID_ARGUMENT, "sru_rt: the custom call has no attribute `call`");
  int64_t small[512];
  const size_t words = key_size(frame, text), bytes = words * sizeof(int64_t);
  int64_t *const key = words <= 512 ? small : (int64_t *)malloc(bytes);
  if (!key) return error(frame, INTERNAL, "sru_rt: out of memory");
  make_key(frame, text, key);
  const uint64_t hash = hash_of(key, words);
  const Plan *const p = find(hash, key, bytes);
  Error *failure = nullptr;
  if (p)
    run(frame, p->kernel, p->pool, p->tasks, p->fields, p->n_fields);
  else
    failure = plan_and_run(frame, hash, key, bytes);
  if (key != small) free(key);
  return failure;
}

EXPORT void xla_set_planner(Planner given) { planner = given; }

// The version 0.`minor` is reported when the handler is registered, or with 0 the one that suits.
EXPORT void xla_report_version(int minor) { reported_minor = minor; }

EXPORT int64_t xla_reply_size() { return sizeof(Reply); }
