//! Chat templates in the manner of several model families, and what hostile ones can do.

use shoal_core::Class;
use shoal_proto::worker::TokenizerBundle;
use shoal_text::{ChatTemplate, Message, TemplateError};

const LLAMA3: &str = "\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
{%- endif %}
{%- if system_message or not tools is none %}
    {{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + system_message + '<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
";

const QWEN25: &str = "\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == 'user') or (message.role == 'system' and not loop.first) or (message.role == 'assistant' and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
";

const QWEN3: &str = "\
{%- set ns = namespace(multi_step=true, last_query=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == 'user' and message.content is string and not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step = false %}
        {%- set ns.last_query = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
";

const MISTRAL: &str = "\
{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}
{{ '[INST] ' + message['content'] + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}
{{ ' ' + message['content'] + eos_token }}
{%- endif %}
{% endfor %}";

fn bundle(template: &str) -> TokenizerBundle {
    TokenizerBundle {
        tokens: ["<s>", "</s>", "<|im_start|>"].map(str::to_owned).to_vec(),
        bos: Some(0),
        eos: Some(1),
        chat_template: template.to_owned(),
        ..Default::default()
    }
}

fn message(role: &str, content: &str) -> Message {
    Message {
        role: role.into(),
        content: content.into(),
        name: None,
    }
}

fn render(template: &str, messages: &[Message]) -> Result<String, TemplateError> {
    ChatTemplate::new(&bundle(template))
        .expect("compiles")
        .render(messages, true)
}

fn chat() -> [Message; 3] {
    [
        message("user", " Hi "),
        message("assistant", "<think>\nhm\n</think>\n\nYes?"),
        message("user", "Go"),
    ]
}

#[test]
fn llama3_trims_and_heads_every_message() {
    assert_eq!(
        render(LLAMA3, &chat()).expect("renders"),
        "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>\
         <|start_header_id|>assistant<|end_header_id|>\n\n<think>\nhm\n</think>\n\nYes?<|eot_id|>\
         <|start_header_id|>user<|end_header_id|>\n\nGo<|eot_id|>\
         <|start_header_id|>assistant<|end_header_id|>\n\n"
    );
    let system = [message("system", "Be brief.\n"), message("user", "Hi")];
    assert_eq!(
        render(LLAMA3, &system).expect("renders"),
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>\
         <|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>\
         <|start_header_id|>assistant<|end_header_id|>\n\n"
    );
}

#[test]
fn qwen25_has_a_default_system_message() {
    assert_eq!(
        render(QWEN25, &[message("user", "Hi")]).expect("renders"),
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n\
         <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    );
}

#[test]
fn qwen3_forgets_old_thoughts() {
    assert_eq!(
        render(QWEN3, &chat()).expect("renders"),
        "<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n\
         <|im_start|>user\nGo<|im_end|>\n<|im_start|>assistant\n"
    );
}

#[test]
fn mistral_wants_roles_to_alternate() {
    assert_eq!(
        render(MISTRAL, &[message("user", "a"), message("assistant", "b")]).expect("renders"),
        "<s>[INST] a [/INST] b</s>"
    );
    let error = render(MISTRAL, &[message("assistant", "b")]).expect_err("refused");
    assert_eq!(
        error.to_string(),
        "Conversation roles must alternate user/assistant/user/assistant/..."
    );
    assert!(matches!(error, TemplateError::Raised { .. }));
    assert_eq!(error.class(), Class::Client);
}

#[test]
fn names_and_the_date_and_json_are_there() {
    let mut named = message("user", "<é>");
    named.name = Some("Ann".into());
    let template =
        "{% for m in messages %}{{ m.name is defined }} {% endfor %}{{ messages[0] | tojson }}";
    assert_eq!(
        render(template, &[named, message("user", "x")]).expect("renders"),
        r#"True False {"role": "user", "content": "<é>", "name": "Ann"}"#
    );
    let date = render("{{ strftime_now('%Y-%m-%d') }}", &[]).expect("renders");
    assert_eq!(date.len(), 10);
    assert!(date.as_str() > "2024-01-01" && date.as_bytes()[7] == b'-');
    assert!(matches!(
        render("{{ strftime_now('%!') }}", &[]),
        Err(TemplateError::Render(_))
    ));
}

#[test]
fn marks_for_training_are_passed_over() {
    let template =
        "{% for m in messages %}{%- generation -%} {{ m.content }} {% endgeneration %}{% endfor %}";
    assert_eq!(
        render(template, &[message("user", "x")]).expect("renders"),
        "x "
    );
}

#[test]
fn nothing_is_no_list_of_tools() {
    let template = "{% if tools is iterable and tools | length > 0 %}tools{% else %}none{% endif %}\
        {{ messages is iterable }}";
    assert_eq!(render(template, &[]).expect("renders"), "noneTrue");
}

#[test]
fn a_model_without_a_template_speaks_chatml_if_it_can() {
    let messages = [message("system", "Be brief."), message("user", "Hi")];
    let mut bundle = bundle("");
    let template = ChatTemplate::new(&bundle).expect("falls back");
    assert_eq!(
        template.render(&messages, true).expect("renders"),
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    );
    assert!(
        template
            .render(&messages, false)
            .expect("renders")
            .ends_with("Hi<|im_end|>\n")
    );
    bundle.tokens.pop();
    let error = ChatTemplate::new(&bundle).err().expect("no template");
    assert!(matches!(error, TemplateError::Missing));
    assert_eq!(error.class(), Class::Client);
}

#[test]
fn a_malformed_template_is_the_models_fault() {
    let error = ChatTemplate::new(&bundle("{% for %}"))
        .err()
        .expect("malformed");
    assert!(matches!(error, TemplateError::Syntax(_)));
    assert_eq!(error.class(), Class::Fatal);
}

#[test]
fn hostile_templates_run_out_of_budget() {
    for template in [
        "{% for a in range(99999) %}{% for b in range(99999) %}{{ b }}{% endfor %}{% endfor %}",
        "{{ 'x' * 1000000000 }}",
        "{% set n = namespace(s='x' * 1000) %}{% for a in range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "{% set n = namespace(s=messages) %}{% for a in range(60) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s }}",
        "{% set n = namespace(s=messages) %}{% for a in range(60) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s | tojson }}",
        "{% set n = namespace(s=messages) %}{% for a in range(24) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
        "{% set n = namespace(s=messages) %}{% for a in range(24) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s | join }}",
    ] {
        let error = render(template, &[message("user", "x")]).expect_err(template);
        assert_eq!(error.class(), Class::Client, "{template}: {error:?}");
    }
}
