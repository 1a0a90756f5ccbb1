// Exceptions inside threads, and what cancellation, pthread_exit and the end of a thread do with C++'s objects.
#include "check.h"
#include <atomic>
#include <future>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

struct Noisy {
    const char *what;
    explicit Noisy(const char *what) : what(what) {}
    ~Noisy() { say("  destroyed: %s", what); }
};

static pthread_key_t key;
static void destroy(void *what) { say("  key's destructor: %s", (char *)what); }
static thread_local Noisy local("thread_local");
static void touch() { say("  uses %s", local.what); }

static void throw_deep(int depth) {
    Noisy noisy("frame");
    if (depth)
        throw_deep(depth - 1);
    else
        throw std::runtime_error("thrown");
}
static void *catches(void *) {
    try {
        throw_deep(3);
    } catch (const std::runtime_error &error) {
        say("  caught: %s", error.what());
    }
    return nullptr;
}
static void *exits(void *) {
    touch();
    pthread_setspecific(key, "exits");
    Noisy noisy("of pthread_exit");
    try {
        pthread_exit((void *)"exited");
    } catch (const std::exception &) {
        say("  WRONG: caught as an exception");
    } catch (...) {
        say("  passing");
        throw;
    }
    return nullptr;
}
static std::atomic<pid_t> tid;
static void *cancelled(void *) {
    touch();
    pthread_setspecific(key, "cancelled");
    Noisy noisy("of a cancelled thread");
    tid = gettid();
    for (;;)
        pause();
}
static void *returns(void *) {
    touch();
    pthread_setspecific(key, "returns");
    Noisy noisy("of a thread that returns");
    return (void *)"returned";
}
struct Last {
    ~Last() {
        say("  thread_local destructor: pthread_self is itself %d, key's value %s",
            (int)pthread_equal(pthread_self(), pthread_self()),
            pthread_getspecific(key) ? (char *)pthread_getspecific(key) : "gone");
    }
};
static void *order(void *) {
    static thread_local Last last;
    (void)&last;
    pthread_setspecific(key, "still there");
    return nullptr;
}

static void run(const char *what, void *(*routine)(void *)) {
    pthread_t thread;
    void *value;
    say("%s", what);
    tid = 0;
    must(pthread_create(&thread, nullptr, routine, nullptr));
    if (routine == cancelled) {
        while (!tid)
            usleep(100);
        await_sleep(tid);
        must(pthread_cancel(thread));
    }
    must(pthread_join(thread, &value));
    say("  %s", value == PTHREAD_CANCELED ? "cancelled" : value ? (char *)value : "null");
}

int main() {
    must(pthread_key_create(&key, destroy));
    run("catch", catches);
    run("exit", exits);
    run("cancel", cancelled);
    run("return", returns);
    run("order", order);

    say("std::thread");
    std::vector<std::thread> threads;
    std::atomic<int> sum{0};
    for (int i = 0; i < 20; i++)
        threads.emplace_back([&sum, i] { sum += i; });
    for (auto &thread : threads)
        thread.join();
    say("  %d", sum.load());

    say("std::async");
    auto answer = std::async(std::launch::async, [] { return std::string("answer"); });
    say("  %s", answer.get().c_str());
    auto failure = std::async(std::launch::async, []() -> int { throw std::logic_error("carried over"); });
    try {
        failure.get();
    } catch (const std::logic_error &error) {
        say("  %s", error.what());
    }

    say("at thread exit");
    std::promise<int> promise;
    auto future = promise.get_future();
    std::thread([&promise] {
        promise.set_value_at_thread_exit(5);
    }).detach();
    say("  %d", future.get());
    try {
        std::thread self;
        self = std::thread([&self] {
            while (self.get_id() != std::this_thread::get_id())
                std::this_thread::yield();
            try {
                self.join();
            } catch (const std::system_error &error) {
                say("  joins itself: %s", name(error.code().value()));
            }
        });
        usleep(20000);
        self.join();
    } catch (const std::system_error &error) {
        say("  %s", error.what());
    }
    return 6;
}
