"""Tables 2 to 4, their page and their figures from made-up results: ours and the paper's numbers never mix."""
import shutil

import matplotlib
import nbformat
import numpy as np
import pandas as pd
import pytest

from bnrcam.data import DataError
from bnrcam.figures import move_apart, published, save_figure, years_figure
from bnrcam.paper import VOC_LABELS, recent, table
from bnrcam.report import (CAPTIONS, SHARE, class_table, load_results, load_segmentation, provenance,
                           segmentation_table, write_index, write_json, write_table)
from bnrcam.submit import read_scores

matplotlib.use('Agg')
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
        'variant': variant, 'seed': seed, 'backbone': backbone, 'split': split, 'labels_from': 'PSA', 'made_by': {},
        'plain': scores(level - 2, names, scored or names, absent),
        'crf': scores(level, names, scored or names, absent)})


@pytest.fixture
def folder(tmp_path):
    for variant in ('baseline', 'noise1', 'supervised'):
        for seed in (0, 1, 2):
            write(tmp_path, variant, seed)
    return tmp_path


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
        with pytest.raises(DataError, match="test_scores_voc.csv: 'noise1-s7' is no run"):
            wrong = returned.assign(run=['noise1-s0', 'noise1-s7'])
            if n == 2:
                class_table(results, wrong, 'voc', 'VOC')
            else:
                segmentation_table(3, results, NOTHING, 'voc', 'VOC', wrong)


def test_no_test_split_no_test_columns(results):
    frame = class_table(results, None, 'animals', None)
    assert not any('test' in name for name in frame)
    assert [name for name in frame if name.startswith('here')] == [
        'here, animals val: TransCAM (baseline)', 'here, animals val: noise x 1 (ours)', 'here, animals val: fully supervised']


def test_class_table_of_other_classes(tmp_path):
    write(tmp_path, 'noise1', 0, SMALL, scored=SMALL[:2])
    frame = class_table(load_segmentation(tmp_path, ['noise1'], [0]), None, 'mini', None).set_index('class')
    assert list(frame.index) == ['background', 'apple', 'fish (not scored)', 'mIoU']
    assert not any('paper' in name for name in frame)
    assert frame['here, mini val: noise x 1 (ours)'].tolist() == ['33.0', '33.1', '33.2', f'{(33 + 33.1) / 2:.1f}']
    assert 'add baseline' in frame['here, mini val: TransCAM (baseline)']['mIoU']
    assert 'true masks' in frame['here, mini val: fully supervised']['mIoU']


def test_absent_class(tmp_path):
    write(tmp_path, 'noise1', 0, SMALL, absent=['fish'])
    frame = class_table(load_segmentation(tmp_path, ['noise1'], [0]), None, 'mini', None).set_index('class')
    assert frame.loc['fish', 'here, mini val: noise x 1 (ours)'] == 'absent'


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
    assert frame.loc['here: fully supervised', ['supervision', SHARE]].tolist() == ['F', '']
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
        for ax, name, n in zip(figure.axes, ('VOC', 'COCO'), (3, 4)):
            ours = 2 if name == benchmark else 0
            assert len(texts(ax)) == len(table(n)) + len(recent()) + ours
            assert sum(text.startswith('here') for text in texts(ax)) == ours


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


def test_published_marks_extra_supervision():
    rows = published('COCO').set_index('label')
    assert rows.loc['AuxSegNet', 'extra'] and rows.loc['ExCEL, ViT-B', 'extra'] and not rows.loc['SeCo, ViT-B', 'extra']
    assert rows.loc['Ours', 'year'] == 2024


# the page

@pytest.fixture
def page(results, folder):
    out = folder / 'page'
    out.mkdir()
    frames = {'table2': class_table(results, no_scores(folder), 'voc', 'VOC'),
              **{f'table{n}': segmentation_table(n, results, NOTHING, 'voc', 'VOC') for n in (3, 4)}}
    for name, frame in frames.items():
        write_table(frame, out, name, provenance(profile='voc'))
    for name in ('figure3', 'years'):
        save_figure(years_figure({}, None), out, name)
    wide = nbformat.v4.new_output('display_data', data={'text/html': frames['table2'].to_html()})
    cell = nbformat.v4.new_code_cell('frame', outputs=[wide])
    for name in (*frames, 'figure3', 'years'):
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), out / f'{name}.ipynb')
    return write_index(out, 'voc', 'A test.')


def test_page_in_the_papers_order(page):
    text = page.read_text()
    places = [text.index(f'id="{name}"') for name in ('table2', 'table3', 'table4', 'years', 'figure3')]
    assert places == sorted(places) and list(CAPTIONS)[:4] == ['table1', 'table2', 'table3', 'table4']
    assert list(CAPTIONS).index('figure2') < list(CAPTIONS).index('figure3') < list(CAPTIONS).index('figure4')
    assert 'segment.tar' in text and 'PROFILE=coco' in text


def test_pages_fit_a_phone(page):
    chromium, driver_path = shutil.which('chromium'), shutil.which('chromedriver')
    if not (chromium and driver_path):
        pytest.skip('needs Chromium and its driver (Debian: apt-get install chromium chromium-driver)')
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ('--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--no-first-run'):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_path))
    try:
        driver.set_window_size(500, 900)
        for path in (page, page.parent / 'table2.html'):
            driver.get(path.as_uri())
            assert driver.execute_script('return document.documentElement.scrollWidth <= window.innerWidth'), path.name
    finally:
        driver.quit()
