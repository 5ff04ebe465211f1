"""A headless browser, and what every page of the project must be in it: on a phone and a desk, light and dark."""
import shutil
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

SIZES = {'phone': (390, 844), 'desk': (1280, 800)}
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
DRIVER = shutil.which('chromedriver')


@contextmanager
def chromium():
    "Chromium without a window; skips the test where there is none."
    if not (CHROMIUM and DRIVER):
        pytest.skip('needs Chromium and its driver (Debian: apt-get install chromium chromium-driver)')
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ('--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--no-first-run',
                 '--disable-background-networking', '--disable-component-update', '--disable-sync'):
        options.add_argument(flag)
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(60)
    try:
        yield driver
    finally:
        driver.quit()


def resize(browser, size):
    "The window as large as asked; a window of Chromium itself is never narrower than 500."
    width, height = SIZES[size]
    browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', {
        'width': width, 'height': height, 'deviceScaleFactor': 1, 'mobile': False})


def colours(browser, scheme):
    browser.execute_cdp_cmd('Emulation.setEmulatedMedia', {'features': [{'name': 'prefers-color-scheme', 'value': scheme}]})


# the least contrast (WCAG 2) of a text with the colour behind it, and the text
CONTRAST = r"""
const context = Object.assign(document.createElement('canvas'), {width: 1, height: 1}).getContext('2d', {willReadFrequently: true});
const seen = {};
const rgba = colour => seen[colour] ??= (() => {  // the browser reads every notation of a colour itself
  context.clearRect(0, 0, 1, 1); context.fillStyle = colour; context.fillRect(0, 0, 1, 1);
  return [...context.getImageData(0, 0, 1, 1).data].map(v => v / 255); })();
const over = (top, below) => [0, 1, 2].map(i => top[3] * top[i] + (1 - top[3]) * below[i]);
const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
const light = colour => .2126 * linear(colour[0]) + .7152 * linear(colour[1]) + .0722 * linear(colour[2]);
const probe = document.body.appendChild(document.createElement('p'));
probe.style.color = 'Canvas';
const canvas = rgba(getComputedStyle(probe).color);
probe.remove();
const behind = element => element ? over(rgba(getComputedStyle(element).backgroundColor), behind(element.parentElement)) : canvas;
let worst = [21, ''];
for (const element of document.querySelectorAll('body *')) {
  const text = [...element.childNodes].filter(n => n.nodeType === 3).map(n => n.data.trim()).join(' ').trim();
  if (!text || element.closest('script, style, noscript, svg, option') || !element.getClientRects().length) continue;
  const back = behind(element), pair = [light(back), light(over(rgba(getComputedStyle(element).color), back))];
  const ratio = (Math.max(...pair) + .05) / (Math.min(...pair) + .05);
  if (ratio < worst[0]) worst = [ratio, text.slice(0, 60)];
}
return worst;
"""
# formulas that only MathJax, which pages without a network do not have, could show
TEX = r"""
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
for (let node; node = walker.nextNode();)
  if (!node.parentElement.closest('pre, code, script, style')) found.push(...(node.data.match(/\$[^$\n]+\$/g) ?? []));
return found;
"""
WIDTH = 'return document.documentElement.scrollWidth'
IMAGES = 'return [...document.images].map(i => [i.naturalWidth, i.alt, i.src.slice(0, 80)])'
LINKS = 'return [...document.links].map(l => l.href)'
IDS = 'return [...document.querySelectorAll("[id], a[name]")].map(e => e.id || e.name)'


def check_page(browser, path, contrast=4.5):
    """Nothing wider than the window, text that can be read, pictures with words for them, links that lead somewhere (to
    files; other sites are not asked), no raw TeX, nothing on the console, under 5 MB."""
    path = Path(path)
    assert path.stat().st_size < 5e6, f'{path}: {path.stat().st_size / 1e6:.1f} MB'
    for scheme in ('light', 'dark'):
        colours(browser, scheme)
        browser.get(path.as_uri())
        for size, (width, _) in SIZES.items():
            resize(browser, size)
            assert browser.execute_script(WIDTH) <= width, f'{path}: wider than a {size}'
        ratio, text = browser.execute_script(CONTRAST)
        assert ratio >= contrast, f'{path}, {scheme}: contrast {ratio:.1f} of "{text}"'
    assert browser.title and browser.execute_script('return document.documentElement.lang') == 'en', path
    for width, alt, source in browser.execute_script(IMAGES):
        assert width and len(alt) > 8 and not alt.startswith('No desc'), f'{path}: {source}, alt "{alt}"'
    assert 'Traceback' not in browser.page_source and not browser.execute_script(TEX), f'{path}: traceback or TeX'
    ids = {path: browser.execute_script(IDS)}
    for link in browser.execute_script(LINKS):
        address = urlsplit(link)
        target = Path(unquote(address.path))
        if address.scheme == 'file':
            assert target.is_file(), f'{path}: dead link {link}'
            anchors = ids.get(target) or target.read_text(encoding='utf-8') if address.fragment else ''
            assert not address.fragment or unquote(address.fragment) in anchors, f'{path}: no such place {link}'
    assert [entry for entry in browser.get_log('browser')] == [], path
