/* fork in threads: the child goes on with the thread that forked, which can create, join, exit and end the process. */
#include "check.h"

static void *value(void *argument) { return argument; }
static struct gate over = GATE;
static void *waits(void *argument) {
    gate_wait(&over);
    return argument;
}
static pthread_t waiting;
/* How often each handler has run here: parent and child write at the same time. */
static int prepared, in_parent, in_child;
static void prepare(void) { prepared++; }
static void parent(void) { in_parent++; }
static void child(void) { in_child++; }
static void say_handlers(void) { say("  handlers: %d before, %d in the parent, %d in the child", prepared, in_parent, in_child); }
static pthread_key_t key;
static void destroy(void *what) { say("  destructor: %s", (char *)what); }

static void await(pid_t pid) {
    int status;
    must(waitpid(pid, &status, 0) != pid);
    if (WIFEXITED(status))
        say("  exit %d", WEXITSTATUS(status));
    else
        say("  signal %d", WTERMSIG(status));
}

static void create_and_join(void) {
    for (int i = 0; i < 20; i++) {
        pthread_t thread;
        void *got;
        must(pthread_create(&thread, NULL, value, &over));
        must(pthread_join(thread, &got));
        must(got != &over);
    }
}

static void *forks(void *unused) {
    pthread_t self = pthread_self();
    say("in a thread");
    pid_t pid = fork();
    if (pid == 0) {
        pthread_attr_t found;
        must(!pthread_equal(self, pthread_self()));
        must(pthread_getattr_np(pthread_self(), &found));
        must(getpid() != gettid());
        must(pthread_kill(self, 0));
        create_and_join();
        say_handlers();
        say("  the child's threads work");
        exit(11);
    }
    await(pid);
    say("the child's only thread returns");
    pid = fork();
    if (pid == 0)
        return unused;
    await(pid);
    say("the child's only thread exits");
    pid = fork();
    if (pid == 0) {
        must(pthread_setspecific(key, "of the child's thread"));
        pthread_exit(NULL);
    }
    await(pid);
    say("the child's child");
    pid = fork();
    if (pid == 0) {
        pid_t inner = fork();
        if (inner == 0) {
            create_and_join();
            _exit(12);
        }
        await(inner);
        create_and_join();
        _exit(13);
    }
    await(pid);
    say("exit while others wait");
    pid = fork();
    if (pid == 0) {
        pthread_t thread;
        must(pthread_create(&thread, NULL, waits, NULL));
        exit(14);
    }
    await(pid);
    say("_Fork");
    pid = _Fork();
    if (pid == 0)
        _exit(15);
    await(pid);
    say_handlers();
    say("vfork");
    pid = vfork();
    if (pid == 0)
        _exit(16);
    await(pid);
    return unused;
}

int main(void) {
    pthread_t thread;
    must(pthread_key_create(&key, destroy));
    must(pthread_create(&waiting, NULL, waits, NULL));
    must(pthread_atfork(prepare, parent, child));
    must(pthread_create(&thread, NULL, forks, NULL));
    must(pthread_join(thread, NULL));
    say("in main");
    pid_t pid = fork();
    if (pid == 0) {
        create_and_join();
        return 17;
    }
    await(pid);
    say("many threads fork");
    pthread_t threads[8];
    gate_open(&over);
    must(pthread_join(waiting, NULL));
    for (int i = 0; i < 8; i++)
        must(pthread_create(&threads[i], NULL, value, NULL));
    for (int i = 0; i < 8; i++)
        must(pthread_join(threads[i], NULL));
    return 18;
}
