"""How the page looks, in fonts and scripts of its own only, and what keeps its two videos in step."""

from __future__ import annotations

import gradio as gr

SANS = ["system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]


def theme() -> gr.Theme:
    """A theme whose fonts are on every machine already: nothing is fetched."""
    plain = gr.themes.Default(primary_hue="indigo", neutral_hue="zinc", font=SANS, font_mono=MONO)
    return plain.set(
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_400",
    )


CSS = """
.gradio-container { max-width: 1360px !important; margin: 0 auto !important; }
#head { display: flex; align-items: baseline; gap: 1rem; flex-wrap: wrap; }
#head h1 { font-size: 1.6rem; font-weight: 700; margin: 0; }
#head p { margin: 0; color: var(--body-text-color-subdued); }
.small { font-size: .85rem; color: var(--body-text-color-subdued); margin: .25rem 0; }
.status { font-weight: 600; min-height: 1.5rem; margin: .25rem 0; }
.status.refused { font-weight: 400; border-left: 4px solid var(--error-icon-color); padding: .2rem .7rem; }
.status.refused { overflow-wrap: anywhere; }
.status progress { display: block; width: 100%; height: .6rem; margin-top: .3rem; appearance: none; border: 0;
  border-radius: 999px; overflow: hidden; background: var(--border-color-primary); }
.status progress::-webkit-progress-bar { background: var(--border-color-primary); }
.status progress::-webkit-progress-value { background: var(--color-accent); }
.status progress::-moz-progress-bar { background: var(--color-accent); }
#files .label-clear-button { display: none; }
#clips { flex-wrap: nowrap; }
#clips > * { min-width: 0 !important; }
.numbers table, .numbers tr, .numbers td, .numbers th { border: 0 !important; }
.empty { padding: 4rem 1rem; text-align: center; max-width: 34rem; margin: auto; }
.empty p { color: var(--body-text-color-subdued); }
.numbers table, .heat table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.numbers table { width: 100%; max-width: 44rem; }
.numbers th, .numbers td { padding: .3rem .6rem; text-align: right; }
.numbers tr { border-bottom: 1px solid var(--border-color-primary) !important; }
.numbers th[scope=row], .numbers th:first-child { text-align: left; font-weight: 500; }
.numbers .told { font-weight: 600; margin: 0 0 .4rem; overflow-wrap: anywhere; }
.heat { margin: 0 0 1rem; contain: inline-size; }
.heat figcaption { margin-bottom: .3rem; font-size: .9rem; }
.heat .scroll { overflow-x: auto; }
.heat th, .heat td { padding: .15rem .5rem; text-align: center; font-size: .8rem; }
.heat th, .heat td { border: 1px solid var(--border-color-primary); }
.heat th { font-weight: 500; white-space: nowrap; color: var(--body-text-color-subdued); }
.heat td.dense { color: var(--body-text-color-subdued);
  background: repeating-linear-gradient(45deg, transparent 0 4px, var(--border-color-primary) 4px 5px); }
#clips video, #mask img, #slider img, #difference img { image-rendering: pixelated; }
#clips video { width: 100%; }
#yaml textarea { font-family: var(--font-mono); font-size: .82rem; }
#gallery, #gallery .gallery-container, #gallery .grid-wrap { min-height: 0 !important; height: auto !important; }
#gallery .grid-container { grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)) !important; }
#gallery .thumbnail-item { aspect-ratio: auto; height: auto; overflow: visible; }
#gallery .thumbnail-item img { aspect-ratio: 2; height: auto; }
#gallery .caption-label { position: static; }
#gallery .caption-label { white-space: normal; max-width: 100%; overflow-wrap: anywhere; }
:focus-visible { outline: 3px solid var(--color-accent) !important; outline-offset: 2px; }
@media (max-width: 640px) { .gradio-container { padding: .5rem !important; } }
"""

# Media events do not bubble, so they are caught on their way down. Whichever video people touch leads the other one.
STEP = """
() => {
  const videos = () => [...document.querySelectorAll('#clips video')];
  const other = (video) => videos().find((one) => one !== video);
  const follow = (event) => {
    const video = event.target;
    if (!(video instanceof HTMLVideoElement) || !video.closest('#clips')) return;
    const second = other(video);
    if (!second || second.readyState < 1) return;
    if (event.type === 'timeupdate' && videos()[0] !== video) return;
    const apart = Math.abs(second.currentTime - video.currentTime);
    if (apart > (event.type === 'timeupdate' ? 0.07 : 0.01) && apart < video.duration - 0.2)
      second.currentTime = video.currentTime;
    if (event.type === 'play' && second.paused) second.play().catch(() => {});
    if (event.type === 'pause' && !second.paused && !video.ended) second.pause();
    if (event.type === 'ratechange' && second.playbackRate !== video.playbackRate)
      second.playbackRate = video.playbackRate;
  };
  for (const name of ['play', 'pause', 'seeked', 'timeupdate', 'ratechange'])
    document.addEventListener(name, follow, true);
  const tell = () => {
    const rate = videos()[0]?.playbackRate || 1;
    document.querySelector('#speed').textContent = `Speed: ${{ 0.5: '½', 0.25: '¼' }[rate] || 1}`;
  };
  for (const name of ['loadedmetadata', 'ratechange']) document.addEventListener(name, tell, true);
}
"""

PLAY_BOTH = """
() => {
  const videos = [...document.querySelectorAll('#clips video')];
  const paused = videos.every((video) => video.paused);
  for (const video of videos) paused ? video.play().catch(() => {}) : video.pause();
}
"""

SLOWER = """
() => {
  const videos = [...document.querySelectorAll('#clips video')];
  const next = { 1: 0.5, 0.5: 0.25, 0.25: 1 }[videos[0]?.playbackRate] || 1;
  for (const video of videos) video.playbackRate = next;
}
"""

LIGHT_OR_DARK = "() => { document.body.classList.toggle('dark'); }"
