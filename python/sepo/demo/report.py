"""The demo's last screen: what happened, whatever that is."""


def print_report(summary: dict) -> None:
    selection, tokens, rows = summary["selection"], summary["tokens"], summary["rows"]
    policy = summary["policy"]
    print("\n== what the oracle selected (held-out pairs; it was never shown the lexicon)")
    print(
        f"words of the judge's lexicon: {selection['lexicon_rate_selected']:.1%} of the selected "
        f"tokens, {selection['lexicon_rate_all']:.1%} of all\n"
        f"lift {selection['lift']:.2f} ({summary['selection_train']['lift']:.2f} on the pairs it "
        f"scored for training); random selection {selection['lift_random']:.2f}"
    )
    print("\n== what a pass over the training pairs reads")
    base = tokens["padded_unshared"]
    for name, count in tokens.items():
        print(f"{name.replace('_', ', '):24}{count:8} tokens {count / base:8.1%}")
    print(f"{'head, all responses':24}{rows['response']:8} rows")
    print(
        f"{'head, selected':24}{rows['selected']:8} rows   {rows['selected'] / rows['response']:8.1%}"
    )
    print("\n== policies on held-out openings (fresh samples, 95 % interval over openings)")
    print(f"{'':12}{'sentiment':>24}{'KL per token':>15}{'pair accuracy':>16}")
    for name, row in policy.items():
        low, high = row["reward_ci95"]
        reward = f"{row['reward']:.3f} [{low:.3f}, {high:.3f}]"
        kl = f"{row['kl_per_token']:.4f}" if "kl_per_token" in row else "-"
        print(f"{name.replace('_', '-'):12}{reward:>24}{kl:>15}{row['accuracy']:>16.1%}")
    print(f"\n{verdict(policy)}")
    total = sum(summary["stages"].values())
    parts = ", ".join(f"{name} {seconds:.0f}" for name, seconds in summary["stages"].items())
    print(f"{total:.0f} s: {parts}")


def verdict(policy: dict) -> str:
    """One sentence on SePO against the reference, true whichever way it went."""
    low, high = policy["sepo"]["reward_ci95"]
    ref_low, ref_high = policy["reference"]["reward_ci95"]
    if low > ref_high:
        return "SePO's sentiment is above the reference's: the 95 % intervals do not overlap."
    if high < ref_low:
        return "SePO's sentiment is below the reference's: the 95 % intervals do not overlap."
    return "SePO's sentiment cannot be told from the reference's: the 95 % intervals overlap."
