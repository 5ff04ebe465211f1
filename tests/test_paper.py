"""The paper's tables as data."""
import pytest
from bnrcam.paper import VOC_LABELS, recent, table


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
    assert not scores[['VOC val', 'COCO val']].isna().any(axis=None)
    assert frame['source'].str.match(r'arXiv \d{4}\.\d{5}; README of \S+/\S+').all()
    assert set(frame['supervision']) == {'I', 'I+L'} and not frame.duplicated(['method', 'backbone']).any()
    for n in range(1, 5):
        assert not set(frame['method']) & set(table(n)['method'])


def test_recent_is_fresh():
    first = recent()
    first.loc[0, 'VOC val'] = 0
    assert recent().loc[0, 'VOC val'] == 74.0
