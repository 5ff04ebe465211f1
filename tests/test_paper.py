"""The paper's tables as data."""
import pytest
from bnrcam.paper import VOC_LABELS, table


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
