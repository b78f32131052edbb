{{/* Names are fixed: what is pinned in the kernel belongs to one mesh a node, so there is one release a cluster. */}}

{{- define "ebbtide.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end }}

{{- define "ebbtide.labels" -}}
app.kubernetes.io/name: ebbtide
app.kubernetes.io/part-of: ebbtide
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "ebbtide.nodeSelectorLabels" -}}
app.kubernetes.io/name: ebbtide
app.kubernetes.io/component: node
{{- end }}

{{- define "ebbtide.controllerSelectorLabels" -}}
app.kubernetes.io/name: ebbtide
app.kubernetes.io/component: controller
{{- end }}

{{/* The pod's namespace is expanded by the kubelet, so that nothing here depends on where the objects are put. */}}
{{- define "ebbtide.xdsAddress" -}}
{{- if .Values.controlPlane.address -}}
https://{{ .Values.controlPlane.address }}
{{- else if .Values.controller.enabled -}}
https://{{ .Values.controller.service.name }}.$(POD_NAMESPACE).svc:{{ .Values.controller.service.port }}
{{- else -}}
{{ fail "controller.enabled is false and controlPlane.address is empty: proxies would have no control plane; set one of them" }}
{{- end -}}
{{- end }}

{{- define "ebbtide.caAddress" -}}
{{- if .Values.controlPlane.caAddress -}}
https://{{ .Values.controlPlane.caAddress }}
{{- else -}}
{{ include "ebbtide.xdsAddress" . }}
{{- end -}}
{{- end }}

{{/* Environment from a map; call with the map. */}}
{{- define "ebbtide.env" -}}
{{- range $name, $value := . }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end }}

{{/* Whether to make an object of a kind that may not be there; call with (list context choice groupVersionKind). */}}
{{- define "ebbtide.wanted" -}}
{{- $context := index . 0 -}}
{{- $choice := index . 1 -}}
{{- if or (eq $choice "always") (and (eq $choice "auto") ($context.Capabilities.APIVersions.Has (index . 2))) -}}
yes
{{- end -}}
{{- end }}

{{/* The name that the controller's certificate holds, whatever its Service is called. */}}
{{- define "ebbtide.controllerName" -}}
ebbtide-controller.$(POD_NAMESPACE).svc
{{- end }}
