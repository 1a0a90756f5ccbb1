/* Nothing of a thread's state is another's: errno, locale, random numbers, the heap's contents. */
#include "check.h"
#include <ctype.h>
#include <locale.h>
#include <sys/random.h>

static void *looks(void *unused) {
    must(errno != 0);
    must(!isalpha('a') || toupper('a') != 'A');
    must(uselocale((locale_t)0) != LC_GLOBAL_LOCALE);
    errno = EXDEV;
    locale_t other = newlocale(LC_ALL_MASK, "C", (locale_t)0);
    uselocale(other);
    return unused;
}
static unsigned long numbers[4000];
static int next;
static void *draws(void *unused) {
    for (int i = 0; i < 20; i++) {
        unsigned long number;
        must(getrandom(&number, sizeof number, 0) != sizeof number);
        numbers[__atomic_fetch_add(&next, 1, __ATOMIC_SEQ_CST)] = number;
    }
    return unused;
}
static int compare(const void *a, const void *b) {
    unsigned long x = *(unsigned long *)a, y = *(unsigned long *)b;
    return (x > y) - (x < y);
}
int main(void) {
    for (int i = 0; i < 50; i++) {
        pthread_t thread;
        must(pthread_create(&thread, NULL, looks, NULL));
        must(pthread_join(thread, NULL));
    }
    say("each thread finds its own errno, locale and character classes");
    for (int round = 0; round < 25; round++) {
        pthread_t threads[8];
        for (int i = 0; i < 8; i++)
            must(pthread_create(&threads[i], NULL, draws, NULL));
        for (int i = 0; i < 8; i++)
            must(pthread_join(threads[i], NULL));
    }
    qsort(numbers, next, sizeof *numbers, compare);
    int twice = 0;
    for (int i = 1; i < next; i++)
        twice += numbers[i] == numbers[i - 1];
    say("%d numbers, %d drawn twice", next, twice);
    return 0;
}
