/** Requirements of Kubernetes' label selectors and node selectors. */

/** One of `matchExpressions`. */
export interface Requirement {
  readonly key: string;
  readonly operator: string;
  readonly values?: readonly string[];
}

/** @returns whether the labels meet it; undefined where the operator is none of those that all selectors share */
export function meetsRequirement(
  labels: Readonly<Record<string, string>>,
  { key, operator, values = [] }: Requirement,
): boolean | undefined {
  const value = labels[key];
  switch (operator) {
    case 'In':
      return value !== undefined && values.includes(value);
    case 'NotIn':
      return value === undefined || !values.includes(value);
    case 'Exists':
      return value !== undefined;
    case 'DoesNotExist':
      return value === undefined;
    default:
      return undefined;
  }
}
