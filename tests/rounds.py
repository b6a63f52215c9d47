"""Rounds as a federation records them, without running one."""


def round_line(number, sites=("north", "south"), **more):
    """One round; site s reads 10 more answer tokens than the site before it."""
    return {
        "event": "round",
        "seconds": 2.0 * number,
        "round": number,
        "loss": 4.0 / number,
        "sites": [
            {
                "site": site,
                "loss": (4.0 + index) / number,
                "answer_tokens": 100 + 10 * index,
                "tokens": 300,
                "rows": 50,
                "seconds": 0.5,
                "uplink_bytes": 2048,
            }
            for index, site in enumerate(sites)
        ],
        "downlink_bytes_per_site": 1024,
        "scores": {"rows": 7, "f1": number / 10, "parse_rate": 1.0},
        **more,
    }
