"""`[filesystem]`: what each type takes, its defaults, and what is said about the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from fledge_tasks.config import ImageConfig
from fledge_tasks.config import load as load_config
from fledge_tasks.errors import ConfigError
from fledge_tasks.filesystem_settings import Filesystem, FilesystemType
from fledge_tasks.filesystems.options import OPTIONS

UUID = "0b0eeb0f-5b73-4ff1-9d6d-0f5b0d3f7a5c"
WRITABLE = [kind for kind, options in OPTIONS.items() if not options.is_read_only]


def load(folder: Path, settings: str) -> ImageConfig:
    (folder / "web").mkdir(exist_ok=True)
    file = folder / "web" / "fledge.toml"
    head = 'version = "1"\nstrategy = "oci_rootfs"\n[source]\nimage = "nginx:alpine"\n[filesystem]\n'
    file.write_text(head + settings)
    return load_config(file, "web/fledge.toml")


def problems(folder: Path, settings: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(folder, settings)
    prefix = "web/fledge.toml: filesystem"
    assert all(f"{problem}".startswith(prefix) for problem in caught.value.problems)
    return [f"{problem}".removeprefix(prefix).lstrip(".") for problem in caught.value.problems]


@pytest.mark.parametrize("kind", WRITABLE)
def test_the_type_alone_gets_the_defaults_of_the_seed(tmp_path: Path, kind: FilesystemType) -> None:
    image = load(tmp_path, f'type = "{kind}"')
    assert image.filesystem == Filesystem(kind, 100)
    assert image.preallocate is False


@pytest.mark.parametrize("kind", WRITABLE)
def test_all_at_once(tmp_path: Path, kind: FilesystemType) -> None:
    words = OPTIONS[kind].feature_words()
    image = load(
        tmp_path,
        f'type = "{kind}"\nsize_buffer_mb = 7\nshrink = true\npreallocate = true\nlabel = "root"\n'
        f'uuid = "{UUID.upper()}"\nblock_size = 4096\nfeatures = {list(reversed(words))}\n',
    )
    assert image.filesystem == Filesystem(
        kind, 7, shrink=True, label="root", uuid=UUID, block_size=4096, features=tuple(sorted(words))
    )
    assert image.preallocate is True


@pytest.mark.parametrize(
    ("settings", "compression", "level"),
    [
        ('type = "squashfs"', "zstd", 3),
        ('type = "squashfs"\nsize_buffer_mb = 0\ncompression_level = 22', "zstd", 22),
        ('type = "squashfs"\ncompression = "gzip"', "gzip", 6),
        ('type = "squashfs"\ncompression = "xz"', "xz", None),
        ('type = "squashfs"\ncompression = "none"', "none", None),
        ('type = "erofs"', "none", None),
        ('type = "erofs"\ncompression = "lz4"', "lz4", None),
        ('type = "erofs"\ncompression = "lz4hc"\ncompression_level = 12', "lz4hc", 12),
    ],
)
def test_read_only_types_have_a_compression_and_no_buffer(
    tmp_path: Path, settings: str, compression: str, level: int | None
) -> None:
    found = load(tmp_path, settings).filesystem
    assert (found.size_buffer_mb, found.compression, found.compression_level) == (0, compression, level)


def test_all_of_a_read_only_type_at_once(tmp_path: Path) -> None:
    more = f'preallocate = true\nlabel = "root"\nuuid = "{UUID}"\nblock_size = 4096\ncompression = "lz4"'
    image = load(tmp_path, f'type = "erofs"\n{more}')
    assert image.filesystem == Filesystem("erofs", 0, label="root", uuid=UUID, block_size=4096, compression="lz4")
    assert image.preallocate is True
    small = load(tmp_path, 'type = "squashfs"\nblock_size = 1048576\ncompression = "lz4"').filesystem
    assert small == Filesystem("squashfs", 0, block_size=1 << 20, compression="lz4")


def test_a_fixed_size_has_no_other_buffer_than_what_is_asked_for(tmp_path: Path) -> None:
    assert load(tmp_path, 'type = "ext4"\nsize_mb = 50').filesystem == Filesystem("ext4", 0, size_mb=50)
    both = load(tmp_path, 'type = "ext4"\nsize_mb = 50\nsize_buffer_mb = 20')
    assert both.filesystem == Filesystem("ext4", 20, size_mb=50)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ('type = "xfs"\nsize_mb = 299', "size_mb: found integer 299, expected an integer from 300 to 16777216"),
        ('type = "btrfs"\nsize_mb = 108', "size_mb: found integer 108, expected an integer from 109 to 16777216"),
        ('type = "ext4"\nsize_mb = 10\nshrink = true', ": found size_mb and shrink = true, expected one of them"),
        ('type = "ext4"\nsize_mb = 10\nsize_buffer_mb = 10',
         ": found size_mb = 10 with size_buffer_mb = 10, expected more than the buffer"),
        ('type = "ext4"\nlabel = "12345678901234567"',
         "label: found string \"12345678901234567\", expected a label of at most 16 bytes, printable, without '/'"),
        ('type = "xfs"\nlabel = "ééééééé"',
         "label: found string \"ééééééé\", expected a label of at most 12 bytes, printable, without '/'"),
        ('type = "ext4"\nlabel = "a\\nb"',
         "label: found string \"a\\nb\", expected a label of at most 16 bytes, printable, without '/'"),
        ('type = "ext4"\nuuid = "00000000-0000-0000-0000-000000000000"',
         f'uuid: found string "00000000-0000-0000-0000-000000000000", expected a UUID such as "{UUID}"'),
        ('type = "xfs"\nblock_size = 512',
         "block_size: found integer 512, expected a block size of xfs: 1024, 2048, 4096"),
        ('type = "ext4"\nblock_size = 65536', "block_size: found integer 65536, expected a block size of ext4: 4096"),
        ('type = "ext4"\ninode_ratio = 100',
         "inode_ratio: found integer 100, expected an integer from 1024 to 67108864"),
        ('type = "xfs"\nfeatures = ["nrext64"]',
         'features[0]: found string "nrext64", expected a feature that xfs and Linux 5.10 guests know: "rmapbt", '
         '"^finobt", "^inobtcount", "^bigtime", "^reflink", "^sparse"'),
        ('type = "xfs"\nfeatures = ["^finobt"]',
         ': found "^finobt" in features, expected "^inobtcount" beside it, which counts what finobt holds'),
        ('type = "btrfs"\nfeatures = ["mixed-bg", "mixed-bg"]',
         "features: found an array, expected an array of different features"),
        ('type = "squashfs"\nsize_buffer_mb = 100',
         ": found a size_buffer_mb, expected none or 0: squashfs is read-only, and has no free space"),
        ('type = "squashfs"\nblock_size = 2048', "block_size: found integer 2048, expected a block size of squashfs: "
         "4096, 8192, 16384, 32768, 65536, 131072, 262144, 524288, 1048576"),
        ('type = "erofs"\ncompression = "zstd"',
         'compression: found string "zstd", expected the string "none", "lz4" or "lz4hc"'),
        ('type = "erofs"\ncompression_level = 5',
         ': found compression_level alone, expected compression = "lz4hc" beside it'),
        ('type = "erofs"\ncompression = "lz4"\ncompression_level = 5',
         ': found a compression_level that "lz4" does not have, expected no level'),
        ('type = "erofs"\ncompression = "lz4hc"\ncompression_level = 13',
         "compression_level: found integer 13, expected an integer from 1 to 12"),
        ('type = "squashfs"\ncompression = "gzip"\ncompression_level = 10',
         ': found a compression_level that "gzip" does not have, expected one from 1 to 9'),
        ('type = "squashfs"\ncompression = "none"\ncompression_level = 1',
         ': found a compression_level that "none" does not have, expected no level'),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path: Path, settings: str, expected: str) -> None:
    assert [each.splitlines()[0] for each in problems(tmp_path, settings)] == [expected]


def test_a_key_of_another_type(tmp_path: Path) -> None:
    [found] = problems(tmp_path, 'type = "xfs"\ninode_ratio = 4096')
    assert found.startswith('inode_ratio: unknown key, allowed with type "xfs": type, size_buffer_mb, size_mb, ')
    [found] = problems(tmp_path, 'type = "squashfs"\nuuid = "x"')
    assert found.startswith('uuid: unknown key, allowed with type "squashfs": type, compression, compression_level, ')
    [found] = problems(tmp_path, 'type = "ext4"\ncompression = "zstd"')
    assert found.startswith('compression: unknown key, allowed with type "ext4": type, size_buffer_mb, ')


def test_a_misspelt_feature(tmp_path: Path) -> None:
    [found] = problems(tmp_path, 'type = "ext4"\nfeatures = ["^has_jurnal"]')
    assert 'did you mean "^has_journal"?' in found


def test_without_a_type_its_own_mistake_is_told(tmp_path: Path) -> None:
    settings = 'label = "12345678901234567"\nblock_size = 1\nfeatures = ["x"]\nsize_mb = 1'
    assert [each.partition(":")[0] for each in problems(tmp_path, settings)] == ["type"]


@pytest.mark.parametrize("kind", WRITABLE)
def test_features_have_one_order(kind: str) -> None:
    options = OPTIONS[kind]
    assert options.features(()) == list(options.default)
    assert not set(options.addable) & set(options.default)
    assert set(options.removable) <= set(options.default)
    assert options.features([f"^{options.removable[-1]}", *reversed(options.addable)]) == [
        *(name for name in options.default if name != options.removable[-1]),
        *options.addable,
    ]
