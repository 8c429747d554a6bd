/* A race that a data race detector must tell, in the library's own code: two calls fill one struct. Usage: race MODEL */
#include "common.h"

#include <pthread.h>

static kinglet_plan plan;

static void *make(void *path) {
    OK(kinglet_plan_make(&plan, (const char *)path, strlen((const char *)path), NULL, NULL));
    return NULL;
}

int main(int argc, char **argv) {
    pthread_t other;
    CHECK(argc == 2);
    plan.struct_size = sizeof plan;
    CHECK(pthread_create(&other, NULL, make, argv[1]) == 0);
    make(argv[1]);
    CHECK(pthread_join(other, NULL) == 0);
    return 0;
}
