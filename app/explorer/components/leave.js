export default function ({ data, parentElement }) {
  const root = parentElement.querySelector(".root"), { address } = JSON.parse(parsed(data));
  if (root.left === address) return;
  root.left = address;
  follow(address);
}
