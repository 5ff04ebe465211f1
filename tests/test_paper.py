"""The paper's tables as data."""
import pytest
from bnrcam.paper import VOC_LABELS, recent, table, transcam_curve


def test_scores_are_percentages():
    for n in range(1, 6):
        scores = table(n).select_dtypes('float')
        assert not scores.isna().any(axis=None) and ((scores > 20) & (scores < 100)).all(axis=None), n


def test_table_is_fresh():
    first = table(1)
    first.loc[0, 'VOC'] = 0
    assert table(1).loc[0, 'VOC'] == 64.9


def test_class_columns_follow_the_label_values():
    assert list(table(2).columns) == ['split', 'method', *VOC_LABELS, 'mIoU']


@pytest.mark.parametrize('n', [0, 6, '1'])
def test_unknown_table(n):
    with pytest.raises(ValueError, match='tables 1 to 5'):
        table(n)


def test_recent_results_are_apart_and_have_sources():
    frame = recent()
    assert list(frame.columns) == ['method', 'venue', 'year', 'backbone', 'supervision', 'VOC val', 'VOC test', 'COCO val',
                                   'source']
    scores = frame[['VOC val', 'VOC test', 'COCO val']]
    assert ((scores > 40) & (scores < 90) | scores.isna()).all(axis=None)
    assert not scores['COCO val'].isna().any() and not scores[['VOC val', 'VOC test']].isna().all(axis=1).any()
    assert frame['source'].str.match(r'(arXiv \d{4}\.\d{5}|doi 10\.\S+)(: .*|; README of \S+/\S+)').all()
    assert set(frame['supervision']) == {'I', 'I+L', 'I+F', 'I+L+F'} and not frame.duplicated(['method', 'backbone']).any()
    for n in range(1, 5):
        assert not set(frame['method']) & set(table(n)['method'])


def test_gains_beyond_the_table_are_those_of_foundation_models():
    "What 00_paper says of the numbers."
    frame = recent().set_index('supervision')
    for column in ('VOC val', 'COCO val'):
        labels_only = frame.loc['I', column].max()
        assert frame[column].max() > labels_only
        assert 'I' not in frame.index[frame[column] > labels_only]
    imagenet = recent().query("supervision == 'I' and not backbone.str.contains('IN-21k')")
    assert imagenet['VOC val'].max() == table(3)['val'].max()


def test_curve_of_transcam():
    curve = transcam_curve()
    assert list(curve.columns) == ['threshold', 'miou', 'fp', 'fn'] and len(curve) == 101
    assert curve['threshold'].tolist() == [i / 100 for i in range(101)]
    assert ((curve[['miou', 'fp', 'fn']].sum(axis=1) - 100).abs() < 1e-6).all()
    for at, row in {0: [23.386, 70.812, 5.802], 44: [64.846, 19.988, 15.166], 100: [3.493, 1.269, 95.238]}.items():
        assert curve.loc[at, ['miou', 'fp', 'fn']].tolist() == row
    assert curve['miou'].idxmax() == 44 and curve['fp'].is_monotonic_decreasing
    rises = curve['miou'].diff().dropna() > 0
    assert rises[:44].all() and not rises[44:].any()  # a digit lost in copying would break the one hill
    assert (curve['miou'].diff().diff().abs().dropna() < .5).all()


def test_recent_is_fresh():
    first = recent()
    first.loc[0, 'VOC val'] = 0
    assert recent().loc[0, 'VOC val'] == 74.0
