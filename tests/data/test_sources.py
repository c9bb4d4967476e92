"""Sources: every kind is listed in a fixed order, and its bytes are read back as they were."""

import csv
import io
import os
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from selfsup_ray.data.images import ImageError
from selfsup_ray.data.sources import Pattern, Source, expand_braces, read_items
from selfsup_ray.data.synthetic import saved, shape_images
from selfsup_ray.data.tables import Columns
from selfsup_ray.errors import ArtifactError, ConfigError

FILES = ["b/2.png", "a/1.png", "a/10.png", "c.png", "a/x/3.png"]


def png(i: int) -> bytes:
    return saved(Image.fromarray(shape_images(i + 1, size=8, seed=i)[0][-1]), "PNG")


COLUMNS = Columns()
CONTENT = {name: png(i) for i, name in enumerate(FILES)}
IN_ORDER = ["a/1.png", "a/10.png", "a/x/3.png", "b/2.png", "c.png"]


def write_files(folder: Path, names: list[str] = FILES) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(CONTENT[name])
    return folder


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_zip(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def listed(source: str | list[str], columns: Columns = COLUMNS) -> list:
    return list(Source(source, columns).items())


def contents(source: str | list[str], columns: Columns = COLUMNS) -> dict[str, bytes | str]:
    """Return the bytes, or the reason why there are none, of every listed item by its name."""
    items = listed(source, columns)
    read = list(read_items(items, image_column=columns.image, max_bytes=10**6))
    assert [item for item, _ in read] == items
    return {
        item.source: data.reason if isinstance(data, ImageError) else data for item, data in read
    }


def below(folder: Path, found: dict[str, bytes | str]) -> dict[str, bytes | str]:
    return {name.removeprefix(f"{folder}/"): data for name, data in found.items()}


def test_a_folder_is_listed_by_name_at_every_level(tmp_path):
    found = below(tmp_path, contents(str(write_files(tmp_path))))
    assert list(found) == IN_ORDER and found == CONTENT


def test_only_images_are_listed_and_the_rest_is_counted(tmp_path):
    write_files(tmp_path)
    for name in ("a/notes.txt", "a/.hidden.png", ".git/1.png", "__MACOSX/1.png", "model.xyz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"not an image")
    (tmp_path / "photo").write_bytes(CONTENT["c.png"])
    (tmp_path / "scan.dat").write_bytes(CONTENT["c.png"])
    source = Source(str(tmp_path), Columns())
    names = [item.source.removeprefix(f"{tmp_path}/") for item in source.items()]
    assert names == [*IN_ORDER, "photo", "scan.dat"]
    assert source.skipped == {".txt": 1, "hidden": 3, ".xyz": 1}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.png", ["c.png"]),
        ("a/*.png", ["a/1.png", "a/10.png"]),
        ("?/*", ["a/1.png", "a/10.png", "a/x/3.png", "b/2.png"]),
        ("**/*.png", IN_ORDER),
        ("**/[12]*", ["a/1.png", "a/10.png", "b/2.png"]),
        ("a/**", ["a/1.png", "a/10.png", "a/x/3.png"]),
        ("a*", ["a/1.png", "a/10.png", "a/x/3.png"]),
    ],
)
def test_a_glob_lists_what_matches_and_what_lies_in_a_folder_that_matches(
    tmp_path, monkeypatch, pattern, expected
):
    monkeypatch.chdir(write_files(tmp_path))
    assert [item.source for item in listed(pattern)] == expected
    whole = [item.source for item in listed(f"{tmp_path}/{pattern}")]
    assert whole == [f"{tmp_path}/{name}" for name in expected]


def test_globs_without_double_star_agree_with_the_shells(tmp_path, monkeypatch):
    monkeypatch.chdir(write_files(tmp_path))
    for pattern in ("*/*.png", "a/1*", "*", "[ab]/?.png", "**/3.png", "**/x/*"):
        mine = {str(p) for p in map(str, Path().rglob("*.png")) if Pattern(pattern).matches(p)}
        shells = {str(p) for p in Path().glob(pattern) if p.is_file()}
        assert mine == shells, pattern


def test_a_list_of_sources_keeps_its_order(tmp_path):
    write_files(tmp_path)
    found = contents([str(tmp_path / "b"), str(tmp_path / "c.png"), str(tmp_path / "a/x")])
    assert list(below(tmp_path, found)) == ["b/2.png", "c.png", "a/x/3.png"]


def test_webdataset_braces_are_expanded(tmp_path):
    assert expand_braces("x-{008..011}.tar") == [f"x-{i:03d}.tar" for i in (8, 9, 10, 11)]
    assert expand_braces("{a,b}/{1..2}") == ["a/1", "a/2", "b/1", "b/2"]
    for i in (0, 1):
        write_tar(tmp_path / f"s-{i}.tar", {f"{i}.png": CONTENT["c.png"]})
    names = [item.source for item in listed(f"{tmp_path}/s-{{0..1}}.tar")]
    assert names == [f"{tmp_path}/s-0.tar/0.png", f"{tmp_path}/s-1.tar/1.png"]


def test_a_csv_manifest_names_files_beside_it_or_anywhere(tmp_path):
    write_files(tmp_path / "images")
    rows = [("images/c.png", "cat"), (str(tmp_path / "images/b/2.png"), ""), ("gone.png", "dog")]
    with open(tmp_path / "list.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *rows])
    found = contents(str(tmp_path / "list.csv"))
    assert list(found.values()) == [CONTENT["c.png"], CONTENT["b/2.png"], "missing"]
    assert [item.label for item in listed(str(tmp_path / "list.csv"))] == ["cat", None, "dog"]


def test_a_table_with_other_columns_says_which_it_has(tmp_path):
    (tmp_path / "list.tsv").write_text("file\tkind\nc.png\tcat\n")
    with pytest.raises(ArtifactError, match=r"no column `path`; it has file, kind.*path_column"):
        listed(str(tmp_path / "list.tsv"))
    write_files(tmp_path)
    columns = Columns(path="file", label="kind")
    [item] = listed(str(tmp_path / "list.tsv"), columns)
    assert item.label == "cat"
    assert list(contents(str(tmp_path / "list.tsv"), columns).values()) == [CONTENT["c.png"]]


@pytest.mark.parametrize("row_group_size", [1, 2, 100])
def test_parquet_gives_the_bytes_in_its_rows(tmp_path, row_group_size):
    table = pa.table(
        {
            "image": [*CONTENT.values(), None],
            "label": [3, 1, None, 0, 2, 2],
            "class_name": ["d", "b", None, "a", "c", "c"],
            "path": [*FILES, None],
        }
    )
    path = tmp_path / "images.parquet"
    pq.write_table(table, path, row_group_size=row_group_size)
    found = contents(str(path))
    assert found == {**CONTENT, f"{path}#5": "missing"}
    items = listed(str(path))
    assert [item.label for item in items] == ["3", "1", None, "0", "2", "2"]
    part = list(read_items(items[1:4], image_column="image", max_bytes=10**6))
    assert [data for _, data in part] == list(CONTENT.values())[1:4]


def test_parquet_with_nothing_but_images_and_hugging_faces_structs_are_read(tmp_path):
    plain, struct = tmp_path / "plain.parquet", tmp_path / "struct.parquet"
    pq.write_table(pa.table({"image": list(CONTENT.values())}), plain)
    rows = [{"bytes": data, "path": name} for name, data in CONTENT.items()]
    pq.write_table(pa.table({"image": rows}), struct)
    assert list(contents(str(plain)).values()) == list(CONTENT.values())
    assert list(contents(str(struct)).values()) == list(CONTENT.values())
    assert contents(str(tmp_path)) == contents([str(plain), str(struct)])


def test_parquet_may_be_a_manifest_too(tmp_path):
    write_files(tmp_path)
    pq.write_table(pa.table({"path": FILES[:2], "label": [1.0, 0.0]}), tmp_path / "list.parquet")
    assert contents(str(tmp_path / "list.parquet")) == {n: CONTENT[n] for n in FILES[:2]}
    assert [item.label for item in listed(str(tmp_path / "list.parquet"))] == ["1", "0"]


@pytest.mark.parametrize(("suffix", "mode"), [("tar", "w"), ("tar.gz", "w:gz"), ("txz", "w:xz")])
def test_tar_members_are_read_in_place(tmp_path, suffix, mode):
    path = write_tar(tmp_path / f"images.{suffix}", {"notes.txt": b"x", **CONTENT}, mode)
    assert below(path, contents(str(path))) == CONTENT
    assert [item.folder for item in listed(str(path))] == ["b", "a", "a", "", "a/x"]


def test_a_tar_of_a_folder_names_its_members_without_the_dot(tmp_path):
    path = write_tar(tmp_path / "a.tar", {f"./{name}": data for name, data in CONTENT.items()})
    assert below(path, contents(str(path))) == CONTENT


def test_webdataset_labels_come_from_cls_and_json(tmp_path):
    image = CONTENT["c.png"]
    members = {
        "s/0.json": b'{"label": 4, "class_name": "ship"}',
        "s/0.png": image,
        "s/1.png": image,
        "s/1.cls": b"7\n",
        "s/2.png": image,
        "s/2.txt": b"a caption",
        "s/3.png": image,
        "s/3.json": b"[1, 2]",
        "s/4.cls": b"3",
    }
    items = listed(str(write_tar(tmp_path / "s.tar", members)))
    assert [(i.label, i.class_name) for i in items] == [
        ("4", "ship"),
        ("7", None),
        (None, None),
        (None, None),
    ]


def test_a_tar_that_ends_early_gives_what_it_has_and_says_so(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", CONTENT).read_bytes()
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole[: 512 + 512 + 512 + 40])  # the second member's pixels are missing
    found = below(cut, contents(str(cut)))
    assert found["b/2.png"] == CONTENT["b/2.png"] and found["a/1.png"] == "truncated"
    assert found[str(cut)] == "truncated" and len(found) == 3


def test_a_damaged_header_inside_a_tar_is_not_taken_for_its_end(tmp_path):
    data = bytearray(write_tar(tmp_path / "a.tar", CONTENT).read_bytes())
    start = data.index(b"a/10.png")
    data[start : start + 300] = os.urandom(300)
    (tmp_path / "a.tar").write_bytes(data)
    found = below(tmp_path, contents(str(tmp_path)))
    assert list(found.values()) == [CONTENT["b/2.png"], CONTENT["a/1.png"], "corrupt"]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_members_are_read_in_place_by_name(tmp_path, method):
    path = write_zip(tmp_path / "images.zip", {"a/": b"", "notes.txt": b"x", **CONTENT}, method)
    found = below(path, contents(str(path)))
    assert found == CONTENT and list(found) == sorted(CONTENT)


def test_the_yfcc_layout_is_a_folder_of_zips(tmp_path):
    for archive, member in (("12/345", "678.jpg"), ("12/345", "001.jpg"), ("00/000", "999.jpg")):
        path = tmp_path / f"{archive}.zip"
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "a") as file:
            file.writestr(member, CONTENT["c.png"])
    names = list(below(tmp_path, contents(str(tmp_path))))
    assert names == ["00/000.zip/999.jpg", "12/345.zip/001.jpg", "12/345.zip/678.jpg"]


def test_bad_zip_members_have_their_reasons(tmp_path):
    path = write_zip(tmp_path / "a.zip", CONTENT)
    data = bytearray(path.read_bytes())
    at = data.index(CONTENT["c.png"]) + 50
    data[at] ^= 0xFF
    central = data.index(b"PK\x01\x02")
    entry = data.index(b"b/2.png", central) - 46
    data[entry + 8] |= 1  # the flag of encryption
    path.write_bytes(data)
    write_zip(tmp_path / "bz.zip", {"1.png": CONTENT["c.png"]}, zipfile.ZIP_BZIP2)
    (tmp_path / "cut.zip").write_bytes(bytes(data[:300]))
    found = below(tmp_path, contents(str(tmp_path)))
    assert found["a.zip/c.png"] == "corrupt" and found["a.zip/b/2.png"] == "unsupported"
    assert found["a.zip/a/1.png"] == CONTENT["a/1.png"]
    assert found["bz.zip/1.png"] == "unsupported" and found["cut.zip"] == "unreadable"


def test_odd_entries_of_a_folder_are_accounted_for(tmp_path):
    write_files(tmp_path)
    (tmp_path / "a" / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "broken.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.png")
    name = os.fsdecode(b"caf\xe9.png")
    (tmp_path / name).write_bytes(CONTENT["c.png"])
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and nothing")
    source = Source(str(tmp_path), Columns())
    read = read_items(list(source.items()), image_column="image", max_bytes=10**6)
    found = {i.source: d.reason if isinstance(d, ImageError) else d for i, d in read}
    found = below(tmp_path, found)
    assert found["broken.png"] == "missing" and found["pipe.png"] == "not_an_image"
    assert found["caf\\xe9.png"] == CONTENT["c.png"] and found["bad.parquet"] == "unreadable"
    assert source.skipped["looped links"] == 1 and len(found) == len(FILES) + 4


def test_a_file_larger_than_allowed_is_not_read(tmp_path):
    write_files(tmp_path / "f")
    write_zip(tmp_path / "a.zip", CONTENT)
    items = listed([str(tmp_path / "f"), str(tmp_path / "a.zip")])
    for item, data in read_items(items, image_column="image", max_bytes=30):
        assert isinstance(data, ImageError) and data.reason == "too_large", item.source


def test_an_archive_that_went_away_is_missing(tmp_path):
    items = listed(str(write_tar(tmp_path / "a.tar", CONTENT)))
    (tmp_path / "a.tar").unlink()
    found = [data for _, data in read_items(items, image_column="image", max_bytes=10**6)]
    assert [data.reason for data in found] == ["missing"] * len(FILES)


def test_nothing_found_is_one_clear_sentence(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ArtifactError, match=r"No images found in .* \(skipped: 1 x \.txt\)"):
        listed(str(tmp_path))
    with pytest.raises(ArtifactError, match=r"There is no source .*nowhere"):
        listed(str(tmp_path / "nowhere"))
    with pytest.raises(ArtifactError, match="No images found in"):
        listed(str(tmp_path / "*.png"))
    with pytest.raises(ConfigError, match="There is: bundled:fashion-mnist"):
        listed("bundled:mnist")


def test_the_bundled_corpus_is_ten_classes_of_a_thousand():
    items = listed("bundled:fashion-mnist")
    labels = [item.label for item in items]
    assert len(items) == 10_000 and {labels.count(str(i)) for i in range(10)} == {1000}
    assert len({item.class_name for item in items}) == 10
    [(_, data)] = read_items(items[9_999:], image_column="image", max_bytes=10**6)
    assert Image.open(io.BytesIO(data)).size == (28, 28)
