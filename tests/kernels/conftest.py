"""Shows at the end of a run how many Triton tests ran in the interpreter: pytest counts each file of them as one."""


def pytest_terminal_summary(terminalreporter):
    lines = [
        value
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "call"
        for name, value in report.user_properties
        if name == "interpreted"
    ]
    if lines:
        terminalreporter.section("Triton kernels in the interpreter")
        for line in lines:
            terminalreporter.write_line(line)
