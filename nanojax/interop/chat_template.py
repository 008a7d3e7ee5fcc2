"""The chat template of exported models: our rendering of conversations in Jinja, for transformers' apply_chat_template.

What lies in `{% generation %}` is supervised. Two things a template cannot say. transformers tokenises the whole text at once:
two text parts in a row are encoded together, and the name of a special token in a message becomes that token.
"""

FILE = "chat_template.jinja"

TEMPLATE = """\
{{- bos_token -}}
{%- set ns = namespace(system=none) -%}
{%- if messages and messages[0].role == 'system' -%}
  {%- set ns.system = messages[0].content -%}
  {%- set turns = messages[1:] -%}
{%- else -%}
  {%- set turns = messages -%}
{%- endif -%}
{%- if not turns -%}{{- raise_exception('a conversation begins with a user message') -}}{%- endif -%}
{%- for message in turns -%}
  {%- if message.role != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
    {{- raise_exception('roles must alternate user and assistant, behind at most one system message') -}}
  {%- endif -%}
  {%- if message.role == 'user' -%}
    {{- '<|user_start|>' -}}
    {%- if loop.first and ns.system is not none -%}{{- ns.system + '\\n\\n' -}}{%- endif -%}
    {{- message.content + '<|user_end|>' -}}
  {%- else -%}
    {{- '<|assistant_start|>' -}}
    {%- if message.content is string -%}
      {%- generation -%}{{- message.content + '<|assistant_end|>' -}}{%- endgeneration -%}
    {%- else -%}
      {%- for part in message.content -%}
        {%- if part.type == 'text' -%}
          {%- generation -%}{{- part.text -}}{%- endgeneration -%}
        {%- elif part.type == 'python' -%}
          {%- generation -%}{{- '<|python_start|>' + part.text + '<|python_end|>' -}}{%- endgeneration -%}
        {%- elif part.type == 'python_output' -%}
          {{- '<|output_start|>' + part.text + '<|output_end|>' -}}
        {%- else -%}
          {{- raise_exception('a part is text, python or python_output') -}}
        {%- endif -%}
      {%- endfor -%}
      {%- generation -%}{{- '<|assistant_end|>' -}}{%- endgeneration -%}
    {%- endif -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant_start|>' -}}{%- endif -%}
"""
