"""Tables 2 to 4, their page and their figures from made-up results: ours and the paper's numbers never mix."""
import base64
import io
import shutil
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch

from bnrcam.data import DataError, VOCFolder
from bnrcam.evaluate import confusion_matrix, curve_confusions, evaluate_seeds, score_histogram
from bnrcam.losses import VARIANTS
from bnrcam.paper import VOC_LABELS, recent, table, transcam_curve
from bnrcam.scenes import SCENE_CLASSES
from bnrcam.cams import CAMs, read_cams, seed_scores, write_cams
from bnrcam.study.figures import (BEYOND, STYLES, VARIANT_NAMES, curve_figure, forward_one, label_figure,
                                  method_figure, move_apart, published, write_figure, years_figure)
from bnrcam.study.page import SLIDER_PAGE, place, slider_map, write_index, write_slider
from bnrcam.study.records import load_results, load_segmentation, provenance, write_json, write_result
from bnrcam.study.submit import read_scores
from bnrcam.study.tables import (DIFFERENCE, SHARE, class_table, noise_table, segmentation_table,
                                 write_table)
from browsing import check_page
from test_site import check_sizes

matplotlib.use('Agg')
RESULTS = Path(__file__).parent.parent / 'nbs/results'
SMALL = ['background', 'apple', 'fish']
LEVEL = {'baseline': 30., 'noise1': 33., 'noise2': 31., 'supervised': 60.}


def scores(level, names, scored, absent=()):
    iou = {name: None if name in absent else level + i / 10 for i, name in enumerate(names)}
    return {'iou': iou, 'scored': list(scored), 'absent': [name for name in scored if name in absent],
            'miou': float(np.mean([iou[name] for name in scored if iou[name] is not None]))}


def write(folder, variant, seed, names=VOC_LABELS, scored=None, split='val', absent=(), name='segment',
          backbone='ResNet38'):
    level = LEVEL[variant] + seed
    write_json(folder / f'{variant}-s{seed}' / f'{name}.json', {
        'variant': variant, 'seed': seed, 'backbone': backbone, 'split': split, 'labels_from': 'PSA', 'provenance': {},
        'plain': scores(level - 2, names, scored or names, absent),
        'crf': scores(level, names, scored or names, absent)})


def three_seeds(folder):
    for variant in ('baseline', 'noise1', 'supervised'):
        for seed in (0, 1, 2):
            write(folder, variant, seed)
    return folder


@pytest.fixture
def folder(tmp_path): return three_seeds(tmp_path)


@pytest.fixture
def results(folder): return load_segmentation(folder, ['baseline', 'noise1'], [0, 1, 2])


def no_scores(tmp_path): return read_scores(tmp_path / 'none.csv', VOC_LABELS[1:])


NOTHING = pd.DataFrame()


def test_results_of_other_splits_or_classes_do_not_mix(folder):
    write(folder, 'noise1', 2, split='train')
    with pytest.raises(DataError, match='noise1-s2/segment.json: scored on another split'):
        load_segmentation(folder, ['baseline', 'noise1'], [0, 1, 2])
    write(folder, 'noise1', 2, scored=VOC_LABELS[:5])
    with pytest.raises(DataError, match='other classes than baseline-s0'):
        load_segmentation(folder, ['baseline', 'noise1'], [0, 1, 2])


def test_missing_results(folder):
    with pytest.raises(DataError, match='noise2-s0/segment.json: no result'):
        load_segmentation(folder, ['noise2'], [0])
    with pytest.raises(DataError, match='pseudo_labels'):
        load_segmentation(folder, [], [0])


# Table 2

def test_class_table_of_voc(results, folder):
    frame = class_table(results, no_scores(folder), 'voc', 'VOC').set_index('class')
    assert list(frame.index) == [*VOC_LABELS, 'mIoU']
    for row in table(2).to_dict('records'):
        column = frame[f"paper, VOC {row['split']}: {row['method']}"]
        assert column.astype(float).tolist() == [row[name] for name in (*VOC_LABELS, 'mIoU')]
    ours = frame['here, PASCAL VOC 2012 val: noise x 1 (ours)']
    assert ours[['background', 'tvmonitor', 'mIoU']].tolist() == ['34.0 ± 1.0 (n=3)', '36.0 ± 1.0 (n=3)', '35.0 ± 1.0 (n=3)']
    test = frame['here, PASCAL VOC 2012 test: noise x 1 (ours)']
    assert (test[:-1] == '').all()
    assert 'data/runs/voc/noise1-s0/segment.tar' in test['mIoU'] and 'data/test_scores_voc.csv' in test['mIoU']


def test_test_columns_are_filled_from_the_server(results):
    returned = pd.DataFrame([{'run': f'noise1-s{seed}', **dict.fromkeys(VOC_LABELS, 50. + seed)} for seed in (0, 1)])
    frame = class_table(results, returned, 'voc', 'VOC').set_index('class')
    test = frame['here, PASCAL VOC 2012 test: noise x 1 (ours)']
    assert test['sofa'] == '50.5 ± 0.7 (n=2)' and test['mIoU'] == '50.5 ± 0.7 (n=2), 1 not uploaded'
    assert 'not uploaded: give' in frame['here, PASCAL VOC 2012 test: TransCAM (baseline)']['mIoU']
    for n in (2, 3):
        with pytest.raises(DataError, match="test_scores_voc.csv: 'noise1-s7' is not a run"):
            wrong = returned.assign(run=['noise1-s0', 'noise1-s7'])
            if n == 2:
                class_table(results, wrong, 'voc', 'VOC')
            else:
                segmentation_table(3, results, NOTHING, 'voc', 'VOC', wrong)


def test_no_test_split_no_test_columns(results):
    frame = class_table(results, None, 'animals', None)
    assert not any('test' in name for name in frame)
    assert [name for name in frame if name.startswith('here')] == [
        'here, animals val: TransCAM (baseline)', 'here, animals val: noise x 1 (ours)', 'here, animals val: fully supervised',
        'here, animals val: ours, difference to baseline']


def test_class_table_of_other_classes(tmp_path):
    write(tmp_path, 'noise1', 0, SMALL, scored=SMALL[:2])
    frame = class_table(load_segmentation(tmp_path, ['noise1'], [0]), None, 'mini', None).set_index('class')
    assert list(frame.index) == ['background', 'apple', 'fish (not scored)', 'mIoU']
    assert not any('paper' in name for name in frame)
    assert frame['here, mini val: noise x 1 (ours)'].tolist() == ['33.0', '33.1', '33.2', f'{(33 + 33.1) / 2:.1f}']
    assert 'add baseline' in frame['here, mini val: TransCAM (baseline)']['mIoU']
    assert 'true masks' in frame['here, mini val: fully supervised']['mIoU']
    assert (frame['here, mini val: ours, difference to baseline'] == '').all()


def test_absent_class(tmp_path):
    write(tmp_path, 'noise1', 0, SMALL, absent=['fish'])
    frame = class_table(load_segmentation(tmp_path, ['noise1'], [0]), None, 'mini', None).set_index('class')
    assert frame.loc['fish', 'here, mini val: noise x 1 (ours)'] == 'absent'


def test_one_seed_has_no_interval(tmp_path):
    for variant in ('baseline', 'noise1'):
        write(tmp_path, variant, 0, SMALL)
    results = load_segmentation(tmp_path, ['baseline', 'noise1'], [0])
    assert class_table(results, None, 'mini', None).iloc[:, -1].tolist() == ['', '', '', 'one seed']
    frame = segmentation_table(3, results, NOTHING, 'mini', None).set_index('method')
    assert frame.loc['here: noise x 1 (ours)', DIFFERENCE] == 'one seed'


# Tables 3 and 4

@pytest.mark.parametrize('n', [3, 4])
@pytest.mark.parametrize('benchmark', ['VOC', 'COCO', None])
def test_published_rows_are_unchanged(results, n, benchmark):
    frame = segmentation_table(n, results, NOTHING, 'x', benchmark)
    paper = table(n)
    head = frame.iloc[:len(paper)]
    for column in paper:
        assert [str(v) for v in head[column]] == ['' if pd.isna(v) else str(v) for v in paper[column]], column
    assert set(head['data']) == {{3: 'PASCAL VOC 2012', 4: 'MS COCO 2014'}[n]} and (head[SHARE] == '').all()
    assert frame['method'].str.startswith('here').tolist() == [False] * len(paper) + [True] * (len(frame) - len(paper))


def test_benchmark_fills_its_own_table_only(results):
    for n, benchmark, profile in ((4, 'VOC', 'coco'), (3, 'COCO', 'voc')):
        rows = segmentation_table(n, results, NOTHING, 'x', benchmark).iloc[len(table(n)):]
        assert len(rows) == 1 and rows['val'].item() == f'not run: `make reproduce PROFILE={profile}`'
        assert not (rows.astype(str).map(lambda v: '±' in v)).any(axis=None)
    rows = segmentation_table(3, results, NOTHING, 'voc', 'VOC').iloc[len(table(3)):]
    assert set(rows['data']) == {'PASCAL VOC 2012'}


def test_other_data_is_marked(results):
    for n in (3, 4):
        rows = segmentation_table(n, results, NOTHING, 'mini', None).iloc[len(table(n)):]
        assert set(rows['data']) == {'mini'} and len(rows) == 6


def test_rows_and_share(results):
    frame = segmentation_table(3, results, NOTHING, 'mini', None).set_index('method')
    assert frame.loc['here: noise x 1 (ours)', 'val'] == '35.0 ± 1.0 (n=3)'
    assert frame.loc['here: noise x 1 (ours), without CRF', 'val'] == '33.0 ± 1.0 (n=3)'
    shares = [100 * (34 + seed) / (61 + seed) for seed in range(3)]
    assert frame.loc['here: noise x 1 (ours)', SHARE] == f'{np.mean(shares):.1f} ± {np.std(shares, ddof=1):.1f} (n=3)'
    assert frame.loc['here: fully supervised', ['supervision', SHARE, DIFFERENCE]].tolist() == ['F', '', '']
    assert frame.loc['here: noise x 1 (ours), without CRF', DIFFERENCE] == '+3.0 [+3.0, +3.0] (n=3)'
    assert frame.loc['here: TransCAM (baseline)', DIFFERENCE] == ''
    assert frame.loc['here: TransCAM (baseline)', ['supervision', 'backbone']].tolist() == ['I', 'ResNet38']


def test_share_needs_the_same_seed(folder):
    def rows():
        results = load_segmentation(folder, ['noise1'], [0, 1, 2])
        return segmentation_table(3, results, NOTHING, 'mini', None).set_index('method')
    shutil.rmtree(folder / 'supervised-s0')
    shutil.rmtree(folder / 'supervised-s1')
    frame = rows()
    assert frame.loc['here: noise x 1 (ours)', SHARE] == f'{100 * 36 / 63:.1f}'
    shutil.rmtree(folder / 'supervised-s2')
    frame = rows()
    assert frame.loc['here: noise x 1 (ours)', SHARE].startswith('no fully supervised')
    assert 'not run' in frame.loc['here: fully supervised', 'val']
    assert 'add baseline' in frame.loc['here: TransCAM (baseline)', 'val']


def test_other_backbones_have_their_own_rows(results, folder):
    write(folder, 'noise1', 0, name='segment-vit_small.x', backbone='vit_small.x')
    modern = load_results(folder, ['noise1-s0'], 'segment-vit_small.x')
    with_modern, without = (segmentation_table(3, results, other, 'mini', None) for other in (modern, NOTHING))
    assert with_modern.iloc[:len(without)].equals(without)
    rows = with_modern.iloc[len(without):]
    assert rows['backbone'].tolist() == 2 * ['vit_small.x'] and (rows[SHARE] == '').all()
    assert len(segmentation_table(4, results, modern, 'voc', 'VOC')) == len(table(4)) + 1


def test_test_scores_in_table_3(results, folder):
    frame = segmentation_table(3, results, NOTHING, 'voc', 'VOC', no_scores(folder)).set_index('method')
    assert 'noise1-s0/segment.tar' in frame.loc['here: noise x 1 (ours)', 'test']
    assert frame.loc['here: noise x 1 (ours), without CRF', 'test'] == ''
    returned = pd.DataFrame([{'run': f'noise1-s{seed}', **dict.fromkeys(VOC_LABELS, 50.)} for seed in range(3)])
    frame = segmentation_table(3, results, NOTHING, 'voc', 'VOC', returned).set_index('method')
    assert frame.loc['here: noise x 1 (ours)', 'test'] == '50.0 ± 0.0 (n=3)'


@pytest.mark.parametrize('benchmark', ['voc', 'ADE'])
def test_unknown_benchmark(results, benchmark):
    with pytest.raises(DataError, match='VOC, COCO or null'):
        segmentation_table(3, results, NOTHING, 'x', benchmark)
    with pytest.raises(DataError, match='VOC, COCO or null'):
        class_table(results, None, 'x', benchmark)
    with pytest.raises(ValueError, match='VOC, COCO or null'):
        years_figure({}, benchmark)


# the years

def texts(ax): return [text.get_text() for text in ax.texts]


def test_years_show_every_row_and_ours_where_they_belong():
    for benchmark in ('VOC', 'COCO', None):
        figure = years_figure({'baseline': 44.4, 'noise1': 55.5, 'supervised': 66.6}, benchmark)
        for ax, panel, n in zip(figure.axes, ('VOC', 'COCO'), (3, 4)):
            ours = 2 if panel == benchmark else 0
            assert len(texts(ax)) == len(table(n)) + recent()[f'{panel} val'].count() + ours
            assert sum(text.startswith('here') for text in texts(ax)) == ours
        legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        assert ('ran here' in legend) == (benchmark is not None)


def test_years_labels_do_not_overlap():
    figure = years_figure({'baseline': 69.1, 'noise1': 70.6}, 'VOC')
    figure.draw_without_rendering()
    for ax in figure.axes:
        boxes = [text.get_window_extent() for text in ax.texts]
        overlaps = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
        assert not overlaps
        left, low, right, high = ax.bbox.extents
        assert all(left < box.x0 and box.x1 < right and low < box.y0 and box.y1 < high for box in boxes)


def test_move_apart():
    rng = np.random.default_rng(0)
    for size in (1, 2, 9):
        heights = rng.random(size)
        moved = move_apart(heights, .2)
        assert (np.diff(np.sort(moved)) > .2 - 1e-9).all() and (np.argsort(moved) == np.argsort(heights)).all()
    assert np.allclose(move_apart([0, 1, 2], .5), [0, 1, 2])


def test_published_marks_the_kind_of_supervision():
    rows = published('COCO').set_index('label')
    assert rows.loc['AuxSegNet', 'supervision'] == 'I+S' and rows.loc['Ours', 'year'] == 2024
    kinds = {method: rows.loc[method, 'kind'] for method in ('SeCo', 'ExCEL', 'DHR', 'WeCLIP+')}
    assert kinds == {'SeCo': BEYOND['I'], 'ExCEL': BEYOND['I+L'], 'DHR': BEYOND['I+F'], 'WeCLIP+': BEYOND['I+F']}
    assert 'WeCLIP+' not in set(published('VOC')['label'])  # no source says its score on VOC val
    assert sum(rows.index.str.startswith('WeakTr, ')) == 4


def test_years_colour_by_kind():
    figure = years_figure({}, None)
    for ax in figure.axes:
        colours = {text.get_text().split()[0]: text.get_color() for text in ax.texts}
        assert [colours[method] for method in ('SeCo', 'ExCEL', 'DHR', 'ModuSeg')] == [
            STYLES[BEYOND[kind]][0] for kind in ('I', 'I+L', 'I+F', 'I+L+F')]


# Figure 4

def test_published_curve_stands_in_figure_4_over_the_same_thresholds():
    ours = pd.DataFrame({'variant': 'baseline', 'seed': 0, 'threshold': [0., .01, .02], 'miou': [1., 2., 3.]})
    alone, both = curve_figure(ours).axes[0], curve_figure(ours, transcam_curve()).axes[0]
    assert len(both.lines) == len(alone.lines) + 1
    line = both.lines[-1]
    assert line.get_label() == 'TransCAM, published' and line.get_linestyle() == '--'
    assert line.get_xdata().tolist() == [0, .01, .02] and line.get_ydata().tolist() == [23.386, 23.474, 23.674]


# Table 5

def test_variant_that_is_not_the_papers_stands_last_in_table_5():
    runs = pd.DataFrame([{'run': f'{variant}-s{seed}', 'variant': variant, 'seed': seed, 'best_miou': 50. + seed,
                          'background_share': 1., 'fp_share': 1., 'fn_share': 1., 'best_threshold': .4,
                          'thresholds': [.2, .4, .6]}
                         for variant in ('baseline', 'noise1', 'noise1_through') for seed in (0, 1)])
    frame = noise_table(runs)
    assert list(VARIANT_NAMES) == list(VARIANTS) and frame['variant'].tolist() == list(VARIANT_NAMES.values())
    assert frame['paper, VOC train'].tolist() == [64.9, 62.4, 66.2, 65.3, 65.3, '']
    last = frame.iloc[-1]
    assert "not the paper's" in last['variant'] and last['here, mIoU (%)'] == '50.5 ± 0.7 (n=2)'


# class names

def test_dollars_in_class_names_are_no_formula(scenes, net):
    "Row names, legend and title say them as they are; as a formula these could not even be parsed."
    odd = 'cost_$5_$x'
    data = VOCFolder(scenes, 'train', SCENE_CLASSES, masks=True)
    data.classes = (odd,) * len(SCENE_CLASSES)
    name = next(name for name, labels in zip(data.names, data.labels) if labels.any())
    output = forward_one(net, data, name, 64)
    labels = {*np.unique(data.mask(name))} - {0, 255}
    for figure, count in ((label_figure(data, [name], {}), len(labels) + 1), (method_figure(np.zeros((9, 9)), output, 1, odd), 1)):
        with plt.rc_context({'svg.fonttype': 'none'}):
            figure.savefig(file := io.BytesIO(), format='svg')
        assert file.getvalue().decode().count(odd) == count
        plt.close(figure)


# the page

@pytest.fixture(scope='module')
def page(tmp_path_factory, scenes):
    folder = three_seeds(tmp_path_factory.mktemp('page'))
    results, out = load_segmentation(folder, ['baseline', 'noise1'], [0, 1, 2]), folder / 'page'
    out.mkdir()
    frames = {'table2': class_table(results, no_scores(folder), 'voc', 'VOC'),
              **{f'table{n}': segmentation_table(n, results, NOTHING, 'voc', 'VOC') for n in (3, 4)}}
    record = provenance(results, profile='voc', random_seeds=[0, 1, 2], parameters={'benchmark': 'VOC'})
    for name, frame in frames.items():
        write_table(frame, out, name, f'{name}. A table.', record)
    for name in ('figure3', 'years'):
        write_figure(years_figure({}, None), out, name, f'{name}. A figure.', record)
    write_slider(out / SLIDER_PAGE, 'a <b>&</b> test', *slider_study(folder, scenes))
    write_result(out, 'threshold', 'threshold. A page.', record, [SLIDER_PAGE])
    for run in results['run']:
        shutil.copytree(folder / run, out / run)
    wide = nbformat.v4.new_output('display_data', data={'text/html': frames['table2'].to_html()})
    png = base64.b64encode((out / 'years.png').read_bytes()).decode()
    picture = nbformat.v4.new_output('display_data', data={'image/png': png})
    cell = nbformat.v4.new_code_cell('frame', outputs=[wide, picture])
    for name in (*frames, 'figure3', 'years', 'threshold', 'noise1-s0/segment'):
        source = RESULTS / f'{name}.ipynb'
        metadata = nbformat.read(source, as_version=4).metadata if source.is_file() else {}
        nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=metadata), out / f'{name}.ipynb')
    return write_index(out, 'voc', 'A test.')


def slider_study(folder, scenes):
    "Data set, names, CAM stores and results for `write_slider`: CAMs are noise on all labels of three images."
    dataset, rng = VOCFolder(scenes, 'train', SCENE_CLASSES, masks=True), torch.Generator().manual_seed(0)
    stores = {'TransCAM': folder / 'cams/baseline', 'ours': folder / 'cams/noise1'}
    for store in stores.values():
        for name, labels in zip(dataset.names, dataset.labels):
            classes = labels.nonzero().flatten()
            maps = [torch.rand(len(classes), 5, 5, generator=rng)]
            write_cams(store / f'{name}.safetensors', CAMs(classes, dataset.mask(name).shape, maps), 'a test')
    results = pd.DataFrame([evaluate_seeds(dataset, store) for store in stores.values()])
    names = [name for name, labels in zip(dataset.names, dataset.labels) if labels.any()][:3]
    return dataset, names, stores, results


def test_page_in_the_papers_order(page):
    text = page.read_text()
    places = [text.index(f'id="{name}"') for name in ('table2', 'table3', 'table4', 'years', 'figure3', 'threshold')]
    order = [path.stem for path in sorted(RESULTS.glob('*.ipynb'), key=place) if path.stem != 'index']
    assert places == sorted(places) and order[:4] == ['table1', 'table2', 'table3', 'table4']
    assert order.index('figure2') < order.index('figure3') < order.index('figure4')
    assert 'segment.tar' in text and 'PROFILE=coco' in text


def test_bold_on_the_page(page):
    assert '<strong>+3.0' in page.read_text() and '<b>&</b>' not in (page.parent / SLIDER_PAGE).read_text()


@pytest.mark.parametrize('file', ['table2.json', 'figure3.json', 'threshold.json', SLIDER_PAGE, 'years.svg'])
def test_nothing_without_its_evidence(page, file):
    path = page.parent / file
    aside = path.rename(page.parent / 'aside')
    with pytest.raises(DataError, match=f'{file}: missing'):
        write_index(page.parent, 'voc', 'A test.')
    aside.rename(path)


def test_slider_map_is_what_evaluate_counts():
    rng = np.random.default_rng(0)
    scores, truth = rng.random((3, 40, 40)).astype(np.float32), rng.integers(0, 6, (40, 40)).astype(np.uint8)
    scores[:, :4] = np.float32(rng.integers(0, 100, (3, 4, 40)) / 100)  # exactly at thresholds
    classes = np.array([1, 2, 5])
    levels, winner, same = np.moveaxis(slider_map(scores, classes, truth), -1, 0)
    assert (same == truth).all()
    expected = curve_confusions(score_histogram(truth, scores, classes, 6))
    for i in range(100):
        assert (confusion_matrix(truth, np.where(levels > i, winner, 0), 6) == expected[i]).all()
    assert slider_map(scores[:0], classes[:0], truth)[..., :2].max() == 0


def test_pages_in_a_browser(page, browser):
    for name in ('index', 'table2', 'figure3', 'noise1-s0/segment', SLIDER_PAGE.removesuffix('.html')):
        check_page(browser, page.parent / f'{name}.html')


def test_figures_keep_their_size_on_a_phone(page, browser):
    for name in ('index', 'figure3'):
        browser.get((page.parent / f'{name}.html').as_uri())
        check_sizes(browser)


def test_evidence_stands_behind_each_item(page, browser):
    browser.get(page.as_uri())
    items = browser.execute_script("""return [...document.querySelectorAll('figure')].map(figure => {
      figure.querySelector('summary').click();
      return [figure.id, figure.querySelector('details').open, figure.querySelector('dl').innerText]; })""")
    assert len(items) == 6
    for name, is_open, text in items:
        assert is_open and f'{name}.json' in text and 'noise1-s2/segment.json' in text and 'benchmark VOC' in text
        assert '{' not in text and all(word in text for word in ('Profile', 'Random seeds', 'Code', 'Libraries', 'Device', 'Made'))


def test_slider_moves_the_mask(page, browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait
    path = page.parent / SLIDER_PAGE
    assert path.stat().st_size < 1e6
    browser.get(path.as_uri())
    WebDriverWait(browser, 20).until(lambda b: b.execute_script('return document.body.dataset.ready'))
    slider = browser.find_element(By.ID, 'threshold')
    assert slider.accessible_name.startswith('Threshold') and slider.aria_role == 'slider'
    counts = lambda: browser.execute_script(
        'return [...document.querySelectorAll("canvas.mask")].map(c => Number(c.dataset.pixels))')
    slider.send_keys(Keys.HOME)
    seen = [counts()]
    for _ in range(99):
        slider.send_keys(Keys.ARROW_RIGHT)
        seen.append(counts())
    assert slider.get_attribute('value') == '99' and browser.find_element(By.ID, 'value').text == '0.99'
    steps = np.diff(np.array(seen), axis=0)
    assert np.array(seen).shape == (100, 6) and (steps <= 0).all() and (steps.sum(0) < 0).all()
    assert browser.execute_script('return [...document.querySelectorAll("canvas")].every(c => c.ariaLabel.length > 10)')
    cells = browser.find_elements(By.CLASS_NAME, 'miou')
    assert len(cells) == 2 and all(cell.text.endswith(' %') for cell in cells)
    assert [entry for entry in browser.get_log('browser') if entry['level'] in ('SEVERE', 'WARNING')] == []


def test_slider_shows_the_very_pixels(page, browser, folder, scenes):
    "The number of coloured pixels at a threshold is that of the mask in numpy."
    from selenium.webdriver.support.ui import WebDriverWait
    dataset, names, stores, _ = slider_study(folder, scenes)
    browser.get((page.parent / SLIDER_PAGE).as_uri())
    WebDriverWait(browser, 20).until(lambda b: b.execute_script('return document.body.dataset.ready'))
    shown = browser.execute_script("""slider.value = 37; slider.dispatchEvent(new Event('input'));
      return [...document.querySelectorAll('canvas.mask')].map(c => Number(c.dataset.pixels))""")
    scores = [seed_scores(read_cams(store / f'{name}.safetensors')).max(0) for name in names for store in stores.values()]
    assert shown == [int((score > np.float32(.37)).sum()) for score in scores]
