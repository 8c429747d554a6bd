/* A library without the feature `grammar`: a reply by a schema or grammar is refused, and says why; tools need none.
 * Usage: lean MODEL */
#include "common.h"

int main(int argc, char **argv) {
    static const char schema[] = "{\"type\":\"object\"}", grammar[] = "start: \"yes\"";
    static const char tools[] = "[{\"type\":\"function\",\"function\":{\"name\":\"sky\"}}]";
    kinglet_runtime *runtime;
    kinglet_request *request;
    static text said;
    CHECK(argc == 2);
    OK(kinglet_runtime_create(&runtime));
    kinglet_model *model = load(runtime, argv[1]);
    kinglet_session *session = open_session(model);
    kinglet_generate_params params = {sizeof params, 4, NULL, 0, 1, 0, NULL, NULL, 0, NULL, 0};
    params.json_schema = schema;
    params.json_schema_len = sizeof schema - 1;
    STATUS(KINGLET_E_UNSUPPORTED, kinglet_session_send(session, "x", 1, &params, NULL, NULL, NULL));
    CHECK(strstr(kinglet_error_last(), "built without the feature `grammar`") != NULL);
    puts(kinglet_error_last());
    STATUS(KINGLET_E_UNSUPPORTED, kinglet_request_start(&request, session, "x", 1, &params, NULL, NULL));
    params.json_schema_len = 0;
    params.grammar = grammar;
    params.grammar_len = sizeof grammar - 1;
    STATUS(KINGLET_E_UNSUPPORTED, kinglet_session_complete(session, "x", 1, &params, NULL, NULL, NULL));
    params.grammar_len = 0;
    OK(kinglet_session_set_tools(session, tools, sizeof tools - 1));
    OK(kinglet_session_send(session, "x", 1, &params, NULL, append, &said));
    CHECK(said.n_chunks == 4);
    kinglet_session_release(session);
    kinglet_model_release(model);
    kinglet_runtime_release(runtime);
    return 0;
}
