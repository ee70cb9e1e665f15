from evidence.rules.energy_efficient_training import joules


def test_energy_is_read_from_the_packages_counters_or_absent(tmp_path):
    assert joules(tmp_path / "none") is None
    for package, microjoules in (("intel-rapl:0", 2_500_000), ("intel-rapl:1", 1_000_000),
                                 ("intel-rapl:0:0", 700_000)):  # the last is a part of the first
        (tmp_path / package).mkdir()
        (tmp_path / package / "energy_uj").write_text(f"{microjoules}\n")
    assert joules(tmp_path) == 3.5
    (tmp_path / "intel-rapl:2").mkdir()
    (tmp_path / "intel-rapl:2" / "energy_uj").mkdir()  # what cannot be read
    assert joules(tmp_path) is None
