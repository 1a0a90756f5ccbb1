/* Several threads fork and create threads all the time, in the children, too. Argument: rounds of each. */
#include "check.h"

static int rounds;
static void *nothing(void *argument) { return argument; }
static void create_and_join(void) {
    pthread_t threads[4];
    for (int i = 0; i < 4; i++)
        must(pthread_create(&threads[i], NULL, nothing, NULL));
    for (int i = 0; i < 4; i++)
        must(pthread_join(threads[i], NULL));
}
static void *creates(void *unused) {
    for (int i = 0; i < 4 * rounds; i++)
        create_and_join();
    return unused;
}
static void *forks(void *bad) {
    for (int i = 0; i < rounds; i++) {
        int status;
        pid_t pid = fork();
        must(pid < 0);
        if (pid == 0) {
            create_and_join();
            _exit(0);
        }
        must(waitpid(pid, &status, 0) != pid);
        if (status)
            __atomic_add_fetch((int *)bad, 1, __ATOMIC_SEQ_CST);
    }
    return NULL;
}
int main(int count, char **arguments) {
    int bad = 0;
    pthread_t threads[4];
    rounds = count > 1 ? atoi(arguments[1]) : 50;
    for (int i = 0; i < 4; i++)
        must(pthread_create(&threads[i], NULL, i % 2 ? creates : forks, &bad));
    for (int i = 0; i < 4; i++)
        must(pthread_join(threads[i], NULL));
    say("%d children ended badly", bad);
    return 0;
}
