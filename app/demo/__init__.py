"""The web page of `sparse-dit demo`: dense and sparse side by side, with numbers and a look inside.

`serve` starts it, `page` and `style` are what people see and the only modules that know Gradio; the others are plain
functions: `limits` (what visitors may ask), `visits` (what they leave behind), `actions` (runs), `watch` (progress and
stop), `inside` (block masks), `pictures` (what is drawn from them).
"""
