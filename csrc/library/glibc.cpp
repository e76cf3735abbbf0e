// Keeps the library loadable on systems older than the one it was built on: no symbol of glibc newer than 2.28, which
// is also what torch's own wheels ask for (manylinux_2_28).
//
// The headers of glibc 2.29 and newer bind exp and log to versions that set no errno, and libstdc++ reads
// __libc_single_threaded of glibc 2.32 to count references without atomics. The linker is told to take the functions
// here instead (-Wl,--wrap, cmake/build.json); only float64 kernels and the tails of rows call them.
#if defined(__x86_64__)

extern "C" {
double exp_of_old(double);
double log_of_old(double);
__asm__(".symver exp_of_old,exp@GLIBC_2.2.5");
__asm__(".symver log_of_old,log@GLIBC_2.2.5");

double __wrap_exp(double x) { return exp_of_old(x); }
double __wrap_log(double x) { return log_of_old(x); }

// Never single-threaded: references are always counted with atomics.
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}

#endif
