"""Labels and the listing: which image has which class, and units of a bounded size."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from selfsup_ray.data.labels import LabelFile, LabelTable, Subset, label_table
from selfsup_ray.data.listing import Item, Listing, read_unit, shown, write_listing
from selfsup_ray.data.tables import Columns
from selfsup_ray.errors import ArtifactError


def written(path: Path, items: Iterable[Item], shard_size: int = 3) -> Listing:
    return write_listing(path, items, shard_size=shard_size, skipped={})


def in_folders(*names: str) -> list[Item]:
    return [Item(name, f"/pictures/{name}", folder=name.rpartition("/")[0]) for name in names]


def labelled(*labels: str | None, class_names: tuple[str | None, ...] = ()) -> list[Item]:
    names = class_names or (None,) * len(labels)
    pairs = enumerate(zip(labels, names, strict=True))
    return [Item(f"{i}.png", "/t", label=a, class_name=b) for i, (a, b) in pairs]


def labels_of(path: Path, items: list[Item], labels: str = "found") -> tuple[list[int], LabelTable]:
    table = label_table(written(path, items), labels)  # type: ignore[arg-type]
    return [table.label_of(item) for item in items], table


def test_a_listing_gives_back_its_items_in_units(tmp_path):
    items = [
        Item("a/1.png", "/pictures/a/1.png", folder="a", label="x", class_name="X"),
        Item("b.zip/2.png", "/pictures/b.zip", "zip-deflate", offset=7, size=9, packed=5, crc=11),
        Item("caf\\xe9.png", "/pictures/caf\udce9.png"),
        Item("c.tar", "/pictures/c.tar", "bad", reason="truncated", detail="it ends"),
    ]
    listing = write_listing(tmp_path / "l", items, shard_size=3, skipped={".txt": 2})
    again = Listing.open(tmp_path / "l")
    assert again.unit_sizes == listing.unit_sizes == (3, 1) and len(again) == 4
    assert [item for unit in range(2) for item in read_unit(again.path, unit)] == items
    assert again.skipped == {".txt": 2}
    assert shown("caf\udce9.png") == "caf\\xe9.png"


def test_a_listing_is_written_while_the_source_is_still_being_read(tmp_path):
    seen = []

    def items():
        for i in range(10):
            seen.append(len(list((tmp_path / "l").glob("*.parquet"))))
            yield Item(f"{i}.png", "/t")

    assert not Listing.is_finished(tmp_path / "l")
    written(tmp_path / "l", items())
    assert seen == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert Listing.is_finished(tmp_path / "l")


def test_an_interrupted_listing_starts_again(tmp_path):
    def stops():
        yield from in_folders("a", "b", "c", "d")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        written(tmp_path / "l", stops())
    assert not Listing.is_finished(tmp_path / "l")
    listing = written(tmp_path / "l", in_folders("x"))
    assert [item.source for item in read_unit(listing.path, 0)] == ["x"]
    assert listing.num_units == 1 and len(list(listing.path.glob("*.parquet"))) == 1


def test_one_folder_per_class_gives_labels(tmp_path):
    found, table = labels_of(tmp_path, in_folders("dog/1", "cat/1", "dog/2", "emu/9"))
    assert found == [1, 0, 1, 2] and table.class_names == ["cat", "dog", "emu"]


def test_the_folder_that_all_share_is_no_class(tmp_path):
    found, table = labels_of(tmp_path, in_folders("train/x/dog/1", "train/x/cat/1"))
    assert found == [1, 0] and table.class_names == ["cat", "dog"]


def test_numbered_folders_are_in_the_order_of_their_numbers(tmp_path):
    found, table = labels_of(tmp_path, in_folders("10/a", "2/a", "0/a"))
    assert found == [2, 1, 0] and table.class_names == ["0", "2", "10"]


@pytest.mark.parametrize(
    "names", [("1", "2"), ("a/1", "a/2"), ("a/1", "b/c/2"), ("a/1", "2"), ("a/b/1", "a/2")]
)
def test_other_layouts_have_no_labels_unless_they_are_asked_for(tmp_path, names):
    found, table = labels_of(tmp_path, in_folders(*names))
    assert found == [-1] * len(names) and table.class_names is None


def test_folders_asked_for_give_the_first_part_in_which_images_differ(tmp_path):
    found, table = labels_of(tmp_path / "1", in_folders("x/a/1", "x/b/c/2", "x/3"), "folder")
    assert found == [0, 1, -1] and table.class_names == ["a", "b"]
    found, table = labels_of(tmp_path / "2", in_folders("x/a/1", "x/a/2"), "folder")
    assert found == [0, 0] and table.class_names == ["a"]
    with pytest.raises(ArtifactError, match="all images lie at the top"):
        labels_of(tmp_path / "3", in_folders("1", "2"), "folder")


def test_no_labels_means_no_labels(tmp_path):
    found, table = labels_of(tmp_path, labelled("3", "1"), "none")
    assert found == [-1, -1] and table.class_names is None


def test_whole_numbers_are_labels_as_they_are(tmp_path):
    items = labelled("4", None, "0", "2", class_names=("deer", None, "plane", None))
    found, table = labels_of(tmp_path, items)
    assert found == [4, -1, 0, 2] and table.class_names == ["plane", "1", "2", "3", "deer"]
    assert LabelTable(**table.to_json()) == table


def test_other_texts_are_ranked_over_the_whole_listing(tmp_path):
    found, table = labels_of(tmp_path, labelled("n2", "n1", "7", "n2", None))
    assert found == [2, 1, 0, 2, -1] and table.class_names == ["7", "n1", "n2"]


def test_a_column_comes_before_folders_and_its_absence_is_an_error_only_when_asked_for(tmp_path):
    items = [*in_folders("a/1", "b/2")]
    with pytest.raises(ArtifactError, match="labels is `column`, but no image has one"):
        labels_of(tmp_path / "1", items, "column")
    items.append(Item("b/3", "/t", folder="b", label="z"))
    assert labels_of(tmp_path / "2", items)[0] == [-1, -1, 0]
    with pytest.raises(ArtifactError, match="may be at most 1000000"):
        labels_of(tmp_path / "3", labelled("5000000"))


def label_file(path: Path, text: str) -> LabelFile:
    path.write_text(text)
    return LabelFile(path, Columns())


def test_a_label_file_covers_a_few_images_by_as_much_path_as_needed(tmp_path):
    items = in_folders("a/1.png", "a/2.png", "b/1.png", "c/4.png", "c/5.png")
    text = "path,label\na/1.png,login\n./c/4.png,maps\n5,news\n2.png,-1\n77,gone\n"
    file = label_file(tmp_path / "l.csv", text)
    found = [item.label for item in file.applied(items)]
    assert found == ["login", None, None, "maps", "news"] and file.num_unmatched == 1


def test_labels_of_the_source_do_not_mix_with_those_of_a_label_file(tmp_path):
    file = label_file(tmp_path / "l.csv", "path,label\n1.png,9\n")
    found = list(file.applied(labelled("a", "b", class_names=("A", "B"))))
    assert [(item.label, item.class_name) for item in found] == [(None, None), ("9", None)]


def test_a_label_file_that_is_ambiguous_or_matches_nothing_is_an_error(tmp_path):
    items = in_folders("a/1.png", "b/1.png")
    with pytest.raises(ArtifactError, match="`1` names 2 images"):
        list(label_file(tmp_path / "a.csv", "path,label\n1,x\n").applied(items))
    with pytest.raises(ArtifactError, match=r"none of its 1 paths \(such as `9\.png`\)"):
        list(label_file(tmp_path / "b.csv", "path,label\n9.png,x\n").applied(items))
    with pytest.raises(ArtifactError, match="holds no labels"):
        label_file(tmp_path / "c.csv", "path,label\n1,\n")
    with pytest.raises(ArtifactError, match="no column `label`; it has path, topic"):
        label_file(tmp_path / "d.csv", "path,topic\n1,x\n")


def subset(path: Path, text: str) -> Subset:
    path.write_text(text)
    return Subset(path)


def test_a_subset_keeps_its_classes_ranked_by_id(tmp_path):
    items = in_folders("train/n03/1", "train/n01/2", "train/n02/3", "train/n03/4")
    skipped: Counter[str] = Counter()
    chosen = subset(tmp_path / "s.txt", "n03 tabby cat\nn01 goldfish\n\n")
    kept = list(chosen.applied(items, skipped))
    assert [item.source for item in kept] == ["train/n03/1", "train/n01/2", "train/n03/4"]
    found, table = labels_of(tmp_path / "l", kept, "column")
    assert found == [1, 0, 1] and table.class_names == ["goldfish", "tabby cat"]
    assert skipped == {"other classes": 1}


def test_a_subset_also_goes_by_labels_and_class_names(tmp_path):
    items = labelled("3", "5", "7", class_names=("cat", "dog", "emu"))
    kept = list(subset(tmp_path / "s.txt", "dog\n3 feline\n").applied(items, Counter()))
    found, table = labels_of(tmp_path / "l", kept, "column")
    assert found == [0, 1] and table.class_names == ["feline", "dog"]


def test_a_subset_with_a_class_that_is_not_there_names_it(tmp_path):
    with pytest.raises(ArtifactError, match="names 1 classes that the source does not have: n99"):
        list(subset(tmp_path / "s.txt", "a\nn99 x\n").applied(in_folders("a/1"), Counter()))
    with pytest.raises(ArtifactError, match="cannot be read"):
        Subset(tmp_path / "none.txt")
    with pytest.raises(ArtifactError, match="names no classes"):
        subset(tmp_path / "empty.txt", "\n")
