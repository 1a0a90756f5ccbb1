// What ends the process: an exception that leaves a thread. Argument: which. std::terminate runs while the stack that
// threw is still there.
#include "check.h"
#include <dlfcn.h>
#include <exception>
#include <execinfo.h>
#include <stdexcept>
#include <thread>

struct Noisy {
    ~Noisy() { say("destroyed"); }
};

extern "C" __attribute__((noinline)) void the_thrower() { throw std::runtime_error("left the thread"); }
extern "C" __attribute__((noinline)) void *the_routine(void *) {
    Noisy noisy;
    the_thrower();
    return nullptr;
}
static void *without_handler(void *) {
    Noisy noisy;
    throw 5;
}
#pragma GCC diagnostic ignored "-Wterminate" // which is the point
static void *does_not_throw(void *) noexcept { throw std::runtime_error("out of noexcept"); }

static void look() {
    void *frames[64];
    int count = backtrace(frames, 64), thrower = 0, routine = 0;
    for (int i = 0; i < count; i++) {
        Dl_info info;
        if (dladdr(frames[i], &info) && info.dli_sname) {
            thrower += strcmp(info.dli_sname, "the_thrower") == 0;
            routine += strcmp(info.dli_sname, "the_routine") == 0;
        }
    }
    say("terminate: the thrower is on the stack %d, the routine %d, current exception %d", thrower, routine,
        std::current_exception() != nullptr);
    abort();
}

int main(int count, char **arguments) {
    const char *way = count > 1 ? arguments[1] : "plain";
    pthread_t thread;
    void *(*routine)(void *) = the_routine;
    if (strcmp(way, "look") == 0)
        std::set_terminate(look);
    if (strcmp(way, "int") == 0)
        routine = without_handler;
    if (strcmp(way, "noexcept") == 0)
        routine = does_not_throw;
    if (strcmp(way, "std") == 0)
        std::thread([] { the_thrower(); }).join();
    must(pthread_create(&thread, nullptr, routine, nullptr));
    must(pthread_join(thread, nullptr));
    return 0;
}
