// Tells AddressSanitizer and ThreadSanitizer about fibers. The engine is compiled without instrumentation (it is not
// what is tested) but with -DCUEMU_ASAN or -DCUEMU_TSAN to match the kernels; otherwise all of this is empty.
#pragma once

#include <cstddef>

#if defined(CUEMU_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(CUEMU_TSAN)
#include <sanitizer/tsan_interface.h>
extern "C" void __tsan_read_range(void* address, unsigned long size);
extern "C" void __tsan_write_range(void* address, unsigned long size);
#endif

namespace cuemu {

#if defined(CUEMU_ASAN)

struct StackBounds {
  const void* bottom = nullptr;
  size_t size = 0;
};
// Around every switch: leave() before, arrive() after. `fake` belongs to the fiber that is left; nullptr for good.
inline void asan_leave(void** fake, StackBounds to) { __sanitizer_start_switch_fiber(fake, to.bottom, to.size); }
inline StackBounds asan_arrive(void* fake) {
  StackBounds from;
  __sanitizer_finish_switch_fiber(fake, &from.bottom, &from.size);
  return from;
}
inline void asan_poison(void* p, size_t size) { __asan_poison_memory_region(p, size); }
inline void asan_unpoison(void* p, size_t size) { __asan_unpoison_memory_region(p, size); }
inline bool asan_is_poisoned(const void* p, size_t size) {
  return __asan_region_is_poisoned(const_cast<void*>(p), size) != nullptr;
}

#else

struct StackBounds {
  const void* bottom = nullptr;
  size_t size = 0;
};
inline void asan_leave(void**, StackBounds) {}
inline StackBounds asan_arrive(void*) { return {}; }
inline void asan_poison(void*, size_t) {}
inline void asan_unpoison(void*, size_t) {}
inline bool asan_is_poisoned(const void*, size_t) { return false; }

#endif

#if defined(CUEMU_TSAN)

inline void* tsan_current() { return __tsan_get_current_fiber(); }
inline void* tsan_create(const char* name) {
  void* fiber = __tsan_create_fiber(0);
  __tsan_set_fiber_name(fiber, name);
  return fiber;
}
inline void tsan_destroy(void* fiber) { __tsan_destroy_fiber(fiber); }
// Switching orders nothing: only barriers do.
inline void tsan_switch(void* fiber) { __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync); }
inline void tsan_release(void* token) { __tsan_release(token); }
inline void tsan_acquire(void* token) { __tsan_acquire(token); }
inline void tsan_copied(void* to, const void* from, size_t size) {
  __tsan_read_range(const_cast<void*>(from), size);
  __tsan_write_range(to, size);
}

#else

inline void* tsan_current() { return nullptr; }
inline void* tsan_create(const char*) { return nullptr; }
inline void tsan_destroy(void*) {}
inline void tsan_switch(void*) {}
inline void tsan_release(void*) {}
inline void tsan_acquire(void*) {}
inline void tsan_copied(void*, const void*, size_t) {}

#endif

}  // namespace cuemu
