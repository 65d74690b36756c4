// Before anything is painted: the colours the reader chose, if not those of the system.
try {
  const theme = localStorage.getItem("megrez.theme");
  if (theme) document.documentElement.dataset.theme = theme;
} catch {
  // No storage: the system's colours.
}
