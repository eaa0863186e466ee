// Light or dark: as the system says, until the reader chooses.

const CHOICE = "headwater-scheme";
const system = window.matchMedia("(prefers-color-scheme: dark)");

export const isDark = () => (localStorage.getItem(CHOICE) ?? (system.matches ? "dark" : "light")) === "dark";

export function startScheme(button, redraw) {
  const apply = () => {
    const dark = isDark();
    document.documentElement.dataset.scheme = dark ? "dark" : "light";
    button.textContent = dark ? "Light" : "Dark";
    button.setAttribute("aria-label", dark ? "Use light colours" : "Use dark colours");
    redraw();
  };
  button.addEventListener("click", () => {
    localStorage.setItem(CHOICE, isDark() ? "light" : "dark");
    apply();
  });
  system.addEventListener("change", apply);
  apply();
}
