// an electric fence around allocations: while it is armed, each one ends at a page that nobody may touch, and a freed
// one stays untouchable, so that a read or write out of bounds ends the process there and then
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static const size_t kPage = 4096, kSpan = 1ul << 40, kMost = 1ul << 31, kFilled = 1ul << 16;
static char* base;
static atomic_size_t next_offset;
static atomic_int armed;

extern void* __libc_malloc(size_t);
extern void __libc_free(void*);
extern void* __libc_realloc(void*, size_t);
extern void* __libc_calloc(size_t, size_t);
extern void* __libc_memalign(size_t, size_t);

void guard_arm(int on) {
  if (base == NULL) {
    void* reserved = mmap(NULL, kSpan, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserved == MAP_FAILED) {
      return;
    }
    base = reserved;
  }
  atomic_store(&armed, on);
}

static int is_guarded(void* p) { return base != NULL && (char*)p >= base && (char*)p < base + kSpan; }

// the size stands before what is handed out
static size_t size_of(void* p) { return ((size_t*)p)[-1]; }

static void* guarded(size_t size, size_t align) {
  // 64 is what torch asks for; its loads of vectors need none, and 16 leaves less after the end
  if (align < 16 || align == 64) {
    align = 16;
  }
  if (size > kMost) {
    errno = ENOMEM;
    return NULL;
  }
  const size_t bytes = (size + align + sizeof(size_t) + kPage - 1) / kPage * kPage;
  const size_t offset = atomic_fetch_add(&next_offset, bytes + kPage);
  char* first = base + offset;
  // the kernel bounds the pieces of a process' memory, and modules of Python that a case is the first to load make
  // many: what comes after that is not fenced
  if (offset + bytes > kSpan || mprotect(first, bytes, PROT_READ | PROT_WRITE) != 0) {
    return __libc_memalign(align, size);
  }
  void* start = (void*)((uintptr_t)(first + bytes - size) & ~(uintptr_t)(align - 1));
  memset(start, 0xA5, size < kFilled ? size : kFilled);
  ((size_t*)start)[-1] = size;
  return start;
}

static void release(void* p) {
  const uintptr_t end = ((uintptr_t)p + size_of(p) + kPage - 1) & ~(uintptr_t)(kPage - 1);
  const uintptr_t begin = ((uintptr_t)p - sizeof(size_t)) & ~(uintptr_t)(kPage - 1);
  madvise((void*)begin, end - begin, MADV_DONTNEED);
  mprotect((void*)begin, end - begin, PROT_NONE);
}

void* malloc(size_t size) { return atomic_load(&armed) ? guarded(size, 16) : __libc_malloc(size); }

void free(void* p) {
  if (is_guarded(p)) {
    const int error = errno;
    release(p);
    errno = error;
  } else {
    __libc_free(p);
  }
}

void* calloc(size_t count, size_t size) {
  size_t bytes;
  if (!atomic_load(&armed)) {
    return __libc_calloc(count, size);
  }
  if (__builtin_mul_overflow(count, size, &bytes)) {
    errno = ENOMEM;
    return NULL;
  }
  void* p = guarded(bytes, 16);
  return p == NULL ? NULL : memset(p, 0, bytes);
}

void* realloc(void* p, size_t size) {
  if (!is_guarded(p)) {
    return p != NULL || !atomic_load(&armed) ? __libc_realloc(p, size) : malloc(size);
  }
  void* moved = malloc(size);
  if (moved != NULL) {
    const size_t before = size_of(p);
    memcpy(moved, p, before < size ? before : size);
    release(p);
  }
  return moved;
}

void* memalign(size_t align, size_t size) {
  return atomic_load(&armed) ? guarded(size, align) : __libc_memalign(align, size);
}

void* aligned_alloc(size_t align, size_t size) { return memalign(align, size); }

int posix_memalign(void** out, size_t align, size_t size) {
  void* p = memalign(align, size);
  if (p == NULL) {
    return ENOMEM;
  }
  *out = p;
  return 0;
}

size_t malloc_usable_size(void* p) {
  static size_t (*next)(void*);
  if (p == NULL) {
    return 0;
  }
  if (is_guarded(p)) {
    return size_of(p);
  }
  if (next == NULL) {
    next = (size_t (*)(void*))dlsym(RTLD_NEXT, "malloc_usable_size");
  }
  return next(p);
}
