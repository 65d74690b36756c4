#include "parsers.h"

// Megrez (Infinigence), whose chat templates know roles and contents only.
// Functions, calls and results are written as the authors' search demo writes them:
// - Functions: listed in the system message, behind one sentence
// - Calls:     <|function_start|>{"name": "foo", "arguments": {...}}<|function_end|>, after any content
// - Results:   a turn of the role "observation"

static const std::string ROLE_START     = "<|role_start|>";
static const std::string ROLE_END       = "<|role_end|>";
static const std::string TURN_END       = "<|turn_end|>";
static const std::string FUNCTION_START = "<|function_start|>";
static const std::string FUNCTION_END   = "<|function_end|>";

bool is_megrez_template(const common_chat_template & tmpl) {
    const auto caps = tmpl.original_caps();
    const auto has  = [&](const std::string & text) { return tmpl.source().find(text) != std::string::npos; };
    return has(ROLE_START) && has(ROLE_END) && has(TURN_END) && !caps.supports_tools && !caps.supports_tool_calls;
}

static void append_text(json & message, const std::string & text) {
    auto & content = message["content"];
    if (content.is_array()) {
        content.push_back({{"type", "text"}, {"text", text}});
    } else {
        content = (content.is_string() ? content.get<std::string>() : "") + text;
    }
}

// What the template says for a conversation that begins without a system message.
static std::string default_system(const common_chat_template & tmpl, autoparser::generation_params inputs) {
    inputs.add_generation_prompt = false;
    const json question = json::array({{{"role", "user"}, {"content", "?"}}});
    const auto prompt   = common_chat_template_direct_apply_impl(tmpl, inputs, question);
    const auto opening  = ROLE_START + "system" + ROLE_END;
    const auto start    = prompt.find(opening);
    if (start == std::string::npos) {
        return "";
    }
    const auto text = start + opening.size();
    return prompt.substr(text, prompt.find(TURN_END, text) - text);
}

static std::string describe(const json & tools) {
    std::string text = "You have access to the following functions. Use them if required -";
    std::string separator = "\n";
    foreach_function(tools, [&](const json & tool) {
        text += separator + tool.at("function").dump(4);
        separator = "\n\n";
    });
    return text;
}

// The arguments stay as they are spelled, so that a call that was generated here has the same tokens again.
static std::string spell_call(const json & tool_call) {
    const auto & function = tool_call.at("function");
    const auto & given    = function.at("arguments");
    std::string arguments = given.is_string() ? given.get<std::string>() : given.dump();
    if (arguments.find_first_not_of(" \t\r\n") == std::string::npos) {
        arguments = "{}";
    } else {
        try {
            json::parse(arguments);
        } catch (const std::exception &) {
            arguments = json(arguments).dump();
        }
    }
    return FUNCTION_START + "{\"name\": " + function.at("name").dump() + ", \"arguments\": " + arguments + "}" + FUNCTION_END;
}

static json rewrite(const json & messages) {
    json result = json::array();
    for (json message : messages) {
        if (message.at("role") == "tool") {
            message["role"] = "observation";
        }
        if (message.contains("tool_calls")) {
            for (const auto & tool_call : message.at("tool_calls")) {
                append_text(message, spell_call(tool_call));
            }
        }
        result.push_back(std::move(message));
    }
    return result;
}

common_chat_params common_chat_params_init_megrez(const common_chat_template & tmpl, const autoparser::generation_params & inputs) {
    common_chat_params data;

    const bool has_schema = inputs.json_schema.is_object() && !inputs.json_schema.empty();
    const bool has_tools  = inputs.tools.is_array() && !inputs.tools.empty() && inputs.tool_choice != COMMON_CHAT_TOOL_CHOICE_NONE;
    const bool required   = has_tools && inputs.tool_choice == COMMON_CHAT_TOOL_CHOICE_REQUIRED;

    json messages = rewrite(inputs.messages);
    if (has_tools) {
        const bool has_system = !messages.empty() && messages.front().at("role") == "system";
        json system = has_system ? messages.front() : json{{"role", "system"}, {"content", default_system(tmpl, inputs)}};
        append_text(system, "\n" + describe(inputs.tools));
        json with_tools = json::array({system});
        for (size_t i = has_system ? 1 : 0; i < messages.size(); i++) {
            with_tools.push_back(messages.at(i));
        }
        messages = std::move(with_tools);
    }

    data.prompt             = common_chat_template_direct_apply_impl(tmpl, inputs, messages);
    data.generation_prompt  = common_chat_template_generation_prompt_impl(tmpl, inputs, messages);
    data.format             = COMMON_CHAT_FORMAT_PEG_NATIVE;
    data.message_delimiters = {
        { COMMON_CHAT_ROLE_ASSISTANT, ROLE_START + "assistant"   },
        { COMMON_CHAT_ROLE_USER,      ROLE_START + "user"        },
        { COMMON_CHAT_ROLE_TOOL,      ROLE_START + "observation" },
        { COMMON_CHAT_ROLE_SYSTEM,    ROLE_START + "system"      },
    };
    if (has_tools) {
        data.preserved_tokens = { FUNCTION_START, FUNCTION_END };
    }
    if (inputs.has_continuation()) {
        data.generation_prompt += inputs.continue_msg.render_content();
        data.prompt            += data.generation_prompt;
    }

    auto parser = build_chat_peg_parser([&](common_chat_peg_builder & p) {
        auto opening = data.generation_prompt.empty() ? p.eps() : p.literal(data.generation_prompt);
        auto answer  = has_schema ? p.content(p.schema(p.json(), "response-format", inputs.json_schema)) : p.content(p.rest());
        if (!has_tools) {
            return opening + answer + p.end();
        }

        auto call = p.choice();
        foreach_function(inputs.tools, [&](const json & tool) {
            const auto &      function = tool.at("function");
            const std::string name     = function.at("name");
            const auto        schema   = common_chat_tool_parameters(function);
            call |= p.rule("tool-" + name, p.tool(
                p.tool_open(p.literal("{") + p.space() + p.literal("\"name\"") + p.space() + p.literal(":") + p.space() +
                            p.literal("\"") + p.tool_name(p.literal(name)) + p.literal("\"")) +
                p.space() + p.literal(",") + p.space() + p.literal("\"arguments\"") + p.space() + p.literal(":") + p.space() +
                p.tool_args(p.schema(p.json(), "tool-" + name + "-schema", schema)) + p.space() +
                p.tool_close(p.literal("}") + p.space() + p.literal(FUNCTION_END))));
        });
        auto calls = p.trigger_rule("tool-call", p.repeat(
            p.literal(FUNCTION_START) + p.space() + call + p.space(), 1, inputs.parallel_tool_calls ? -1 : 1));

        if (required) {
            return opening + calls + p.end();
        }
        if (has_schema) {
            return opening + p.choice({ calls, answer }) + p.end();
        }
        // what is no call after all is content
        return opening + p.choice({ p.content(p.until(FUNCTION_START)) + calls + p.end(), answer + p.end() });
    });
    data.parser = parser.save();

    if (has_schema || has_tools) {
        data.grammar_lazy = !has_schema && !required;
        data.grammar      = build_grammar([&](const common_grammar_builder & builder) {
            parser.build_grammar(builder, data.grammar_lazy);
        });
        if (data.grammar_lazy) {
            data.grammar_triggers = {{ COMMON_GRAMMAR_TRIGGER_TYPE_WORD, FUNCTION_START }};
        }
    }
    return data;
}
